"""What a compression is expected to take: frozen, printable."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import listed
from ..tables import aligned

GIB = 1 << 30
UNKNOWN = "not estimated"


@dataclass(frozen=True)
class Expected:
    """What is expected of one stage: None where it cannot be told beforehand."""

    name: str
    flops: float | None
    seconds: float | None


@dataclass(frozen=True)
class Estimate:
    """What a compression would take.

    Attributes:
        model: name of its class.
        layers: number of targets.
        params, targeted, kept: numbers in the whole model, in the targets, and in the model
            afterwards.
        rows, length: of the data.
        from_disk, in_memory: bytes, the most memory that lies in no file: with statistics and
            factors in files, and without. Libraries are included.
        available: bytes of memory that this process may still take.
        scratch: bytes of the unnamed files beside the output.
        output: bytes of the weights that are written.
        stages: under the names of `Report.stages`.
        notes: what is not known, or not as it was asked.
    """

    model: str
    layers: int
    params: int
    targeted: int
    kept: int
    rows: int
    length: int
    from_disk: int
    in_memory: int
    available: int
    scratch: int
    output: int
    stages: tuple[Expected, ...]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all stages that are estimated."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    def table(self) -> list[dict[str, str]]:
        """One row per stage, as text."""
        return [
            {
                "stage": stage.name,
                "FLOPs": UNKNOWN if stage.flops is None else f"{stage.flops:.1e}",
                "time": "" if stage.seconds is None else lasting(stage.seconds),
            }
            for stage in self.stages
        ]

    def __str__(self) -> str:
        left = [stage.name for stage in self.stages if stage.seconds is None]
        without = f", without {listed(left)}" if left else ""
        return "\n".join(
            [
                f"{self.model}: {self.params:,} parameters, {self.targeted:,} in {self.layers} "
                f"targets; about {self.kept:,} are kept",
                f"data: {self.rows} rows of {self.length} tokens",
                f"memory in no file: {self.from_disk / GIB:.2f} GiB from disk, "
                f"{self.in_memory / GIB:.2f} GiB in memory; "
                f"{self.available / GIB:.2f} GiB are available",
                f"disk: {self.scratch / GIB:.2f} GiB of scratch files from disk, "
                f"{self.output / GIB:.2f} GiB of output",
                *aligned(self.table()),
                f"time: about {lasting(self.seconds)} on this machine{without}",
                *self.notes,
            ]
        )


def lasting(seconds: float) -> str:
    """A duration in a unit that fits it."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
