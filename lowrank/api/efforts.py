"""How hard to try: what each `effort` stands for. Figures: benchmarks/results/quality_*.json."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import unknown
from ..recover.recovery import Recovery


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


def effort(named: str | Recovery | Effort) -> Effort:
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
