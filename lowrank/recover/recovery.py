"""Recovery stages, and what each `effort` stands for.

Measured in benchmarks/results/quality_*.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any

from ..errors import LowrankError, unknown
from .optimizer import MUON, OPTIMIZERS


@dataclass(frozen=True)
class Recovery:
    """The stages of recovery, each of which can be set by hand.

    Attributes:
        dense: λ in [0, 1] of the sequential refit: the target of a layer is λ times its output in
            the dense model plus 1 − λ times the dense layer's output on the compressed input. A
            pair: of the first and of the last layer, and evenly in between.
        refit: run the sequential refit.
        sums: a layer whose output is added to a stream is refitted to the dense model's sum, and so
            makes up for λ times the stream's error; else to its own output.
        shrinkage: of the refit, which stays the closer to the dense weight the fewer tokens were
            read: so many times in / tokens, relative to each input's second moment, are added to
            the diagonals of H' and C (linalg/refit.py).
        batchnorm: re-estimate the running means and variances of batch norms; reverted unless that
            lowers held-out KL.
        temperature: scale the logits by the factor of least held-out KL, through the weight of the
            norm before the output head.
        block_steps: gradient steps of each block refit; 0 skips it.
        distill_steps: gradient steps of distillation from the dense model; 0 skips it.
        block_rate, distill_rate: RMS of a step, relative to each parameter's RMS. That of
            distillation is by default at most 0.008 (AdamW 0.01), less for batches of few
            predictions and, by Muon, near the dense model (`usual_rate`), and half of that for
            `nested`.
        optimizer: "muon" for matrices, with AdamW for vectors, or "adamw" for all.
        rows: batch size of both.
        augment: each step of distillation mirrors and shifts its images (images.py); other data
            is distilled on as it is, which the report says.
        written: rows that a causal language model samples itself, as for `data="self"`, to distil
            on in addition to the data; other models use the data alone.
        nested: least ratio that the model shall serve besides its own; distillation then draws a
            ratio between the two for each step, and `at_rank` cuts the result to any of them.
        minutes: time for the whole call: the closed form runs whole, and training takes what it
            leaves, in fewer steps or, while they gain, in more. Default: no limit, and exactly
            these steps.
    """

    dense: float | tuple[float, float] = (0.9, 0.5)
    refit: bool = True
    sums: bool = True
    shrinkage: float = 2.0
    batchnorm: bool = True
    temperature: bool = True
    block_steps: int = 0
    distill_steps: int = 0
    block_rate: float = 0.005
    distill_rate: float | None = None
    optimizer: str = MUON
    rows: int = 16
    augment: bool = False
    written: int = 0
    nested: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        shares = self.dense if isinstance(self.dense, tuple) else (self.dense, self.dense)
        numbers = all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares)
        if len(shares) != 2 or not numbers:
            raise LowrankError(
                f"dense of a Recovery must be in [0, 1], or a pair of such, got {self.dense!r}"
            )
        for name in (
            "block_steps",
            "distill_steps",
            "block_rate",
            "distill_rate",
            "rows",
            "written",
            "shrinkage",
        ):
            value = getattr(self, name)
            if value is None and name == "distill_rate":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise LowrankError(f"{name} of a Recovery must be a number >= 0, got {value!r}")
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", str(self.optimizer), OPTIMIZERS)
        if self.rows < 1:
            raise LowrankError(f"rows of a Recovery must be >= 1, got {self.rows!r}")
        if self.augment not in (True, False) or (self.augment and not self.distill_steps):
            raise LowrankError(
                f"augment={self.augment!r} is True or False, whether distillation changes its "
                f"images: give distill_steps with it, got {self.distill_steps!r}"
            )
        if self.nested is not None:
            self._check_nested(self.nested)
        if self.minutes is not None:
            check_minutes(self.minutes)
            if not self.block_steps and not self.distill_steps:
                raise LowrankError(
                    f"minutes={self.minutes!r} is time for training, but without block_steps and "
                    "distill_steps nothing is trained: drop it, or take effort='balanced' or 'best'"
                )

    def _check_nested(self, least: Any) -> None:
        """Raises LowrankError for a ratio that is none, or that nothing would use."""
        known = isinstance(least, Real) and not isinstance(least, bool)
        if not known or not 0 < float(least) < 1:
            raise LowrankError(f"nested is the least ratio to serve, in (0, 1), got {least!r}")
        if not self.distill_steps or self.block_steps:
            raise LowrankError(
                f"nested={least!r} is trained by distillation of the whole model alone: give "
                f"distill_steps, and no block_steps, got {self.distill_steps!r} and "
                f"{self.block_steps!r}"
            )

    @classmethod
    def from_json(cls, body: Any) -> Recovery | None:
        """The recovery in a plan's settings; None for no recovery.

        Raises:
            LowrankError: `body` has other fields, or is not an object.
        """
        if body is None:
            return None
        known = {field.name for field in fields(cls)}
        if not isinstance(body, Mapping) or set(body) - known:
            raise LowrankError(
                f"'recovery' in the plan may have {', '.join(sorted(known))}, got {body!r:.80}"
            )
        dense = body.get("dense")
        return cls(**{**body, "dense": tuple(dense)} if isinstance(dense, list) else body)

    def share(self, place: float) -> float:
        """λ of a layer at a place in the order of calls, 0 for the first and 1 for the last."""
        first, last = self.dense if isinstance(self.dense, tuple) else (self.dense, self.dense)
        return first + (last - first) * place

    def to_json(self) -> dict[str, Any]:
        dense = list(self.dense) if isinstance(self.dense, tuple) else self.dense
        return {**asdict(self), "dense": dense}


def check_minutes(minutes: Any) -> None:
    """Raises LowrankError unless it is a finite number above 0."""
    known = isinstance(minutes, Real) and not isinstance(minutes, bool)
    if not known or not 0 < float(minutes) < math.inf:
        raise LowrankError(f"minutes must be a number > 0, got {minutes!r}")


@dataclass(frozen=True)
class Effort:
    """What an `effort` stands for: defaults that explicit arguments override."""

    recovery: Recovery
    method: str = "two-sided"
    policy: str = "lossaware"
    storage: str = "pivoted"


FAST = Effort(Recovery())
EFFORTS: dict[str, Effort] = {
    "fast": FAST,
    "balanced": replace(FAST, recovery=Recovery(rows=4, block_steps=480)),
    "best": replace(
        FAST, recovery=Recovery(rows=4, block_steps=480, distill_steps=2400, written=512)
    ),
}


def effort_of(named: str | Recovery | Effort) -> Effort:
    """The Effort of a name or of a Recovery; an Effort is returned unchanged.

    Raises:
        LowrankError: the name is unknown.
    """
    if isinstance(named, Effort):
        return named
    if isinstance(named, Recovery):
        nested = {} if named.nested is None else {"policy": "uniform", "storage": "factors"}
        return replace(FAST, recovery=named, **nested)
    if named not in EFFORTS:
        raise unknown("effort", str(named), EFFORTS)
    return EFFORTS[named]
