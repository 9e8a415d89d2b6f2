"""Every site keeps the same share of its energy: 1 − error / total."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import LowrankError
from ..types import Allocation, Budget, Curve, Option, Probe
from .common import Choice, disjoint, least_that_fits


@dataclass(frozen=True)
class Energy:
    """One share for all sites: the largest that fits the budget, or `share` itself if it is given.

    Attributes:
        share: energy kept, in (0, 1]; the budget is then ignored.
    """

    share: float | None = None

    judges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            raise LowrankError(f"the energy share must be in (0, 1], got {self.share}")

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        by_sites = disjoint(curves)

        def choose(lost: float) -> Choice:
            return {sites: _first_within(curve, lost) for sites, curve in by_sites.items()}

        if self.share is not None:
            return choose(1 - self.share)
        shares = {_lost(curve, error) for curve in curves for error in curve.errors}
        return least_that_fits(sorted(shares), choose, budget, "energy")


def _lost(curve: Curve, error: float) -> float:
    return error / curve.total if curve.total > 0 else 0.0


def _first_within(curve: Curve, lost: float) -> Option:
    """The smallest option that loses no more than this share of the energy."""
    within = (i for i, e in enumerate(curve.errors) if _lost(curve, e) <= max(lost, 0.0))
    return curve.options[next(within)]
