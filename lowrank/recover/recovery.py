"""How hard to try: what follows the choice of ranks, and what each `effort` stands for.

Figures: benchmarks/results/quality_*.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import LowrankError, unknown


@dataclass(frozen=True)
class Recovery:
    """What follows the choice of ranks, stage by stage; every part can be chosen by hand.

    Attributes:
        dense: λ in [0, 1] of the sequential refit: how much of a layer's target is the dense
            model's own output, the rest being the dense layer on the compressed input.
        refit: whether there is a sequential refit at all.
        batchnorm: whether running means and variances of batch norms are re-estimated then; kept
            where held-out rows gain.
        block_steps: gradient steps of each block's refit; 0 leaves it out.
        distill_steps: gradient steps of distillation to the dense model's predictions; 0: none.
        block_rate, distill_rate: of AdamW, as a share of each parameter's root mean square.
        rows: of a batch in both.
        written: rows that a causal language model writes itself, as `data="self"` does, and is
            distilled on beside the data; other models have the data alone.
    """

    dense: float = 0.5
    refit: bool = True
    batchnorm: bool = True
    block_steps: int = 0
    distill_steps: int = 0
    block_rate: float = 0.01
    distill_rate: float = 0.01
    rows: int = 16
    written: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dense <= 1:
            raise LowrankError(f"dense of a Recovery must be in [0, 1], got {self.dense!r}")
        for name in (
            "block_steps",
            "distill_steps",
            "block_rate",
            "distill_rate",
            "rows",
            "written",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise LowrankError(f"{name} of a Recovery must be a number >= 0, got {value!r}")
        if self.rows < 1:
            raise LowrankError("a batch has at least one row")

    @classmethod
    def from_json(cls, body: Any) -> Recovery | None:
        """What a plan's settings hold; None where nothing follows.

        Raises:
            LowrankError: it is no object of these fields.
        """
        if body is None:
            return None
        known = {field.name for field in fields(cls)}
        if not isinstance(body, Mapping) or set(body) - known:
            raise LowrankError(
                f"'recovery' in the plan must have {', '.join(sorted(known))}, got {body!r:.80}"
            )
        return cls(**body)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Effort:
    """What a word stands for, wherever the caller does not say otherwise."""

    recovery: Recovery
    method: str = "two-sided"
    policy: str = "lossaware"
    storage: str = "pivoted"


FAST = Effort(Recovery())
EFFORTS: dict[str, Effort] = {
    "fast": FAST,
    "balanced": replace(FAST, recovery=Recovery(block_steps=120)),
    "best": replace(FAST, recovery=Recovery(block_steps=120, distill_steps=600, written=512)),
}


def effort_of(named: str | Recovery | Effort) -> Effort:
    """What a word, or a Recovery alone, stands for; an Effort is returned as it is.

    Raises:
        LowrankError: another word.
    """
    if isinstance(named, Effort):
        return named
    if isinstance(named, Recovery):
        return replace(FAST, recovery=named)
    if named not in EFFORTS:
        raise unknown("effort", str(named), EFFORTS)
    return EFFORTS[named]
