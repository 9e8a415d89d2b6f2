"""Every site keeps the same share of its own cost: the usual baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from ..types import Allocation, Budget, Curve, Option, Probe
from .common import Choice, check_reachable, disjoint, spent


@dataclass(frozen=True)
class Uniform:
    """The largest options with cost ≤ share · dense cost, for the share that the budget allows.

    A site whose smallest option exceeds its share keeps that one, and the others get less.
    """

    judges: ClassVar[bool] = False

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        by_sites = disjoint(curves)
        check_reachable(curves, budget)
        unit = budget.unit
        whole = spent((curve.dense for curve in curves), unit)
        # The limit was rounded down; every cost strictly below limit + 1 sums to at most limit.
        share = Fraction(budget.limit + 1, whole)

        def choose(share: Fraction) -> Choice:
            return {
                sites: _largest_below(curve, share * curve.dense.cost.of(unit), budget)
                for sites, curve in by_sites.items()
            }

        chosen = choose(share)
        low, high = Fraction(0), share
        while spent(chosen.values(), unit) > budget.limit and high - low > Fraction(1, whole):
            middle = (low + high) / 2
            trial = choose(middle)
            if spent(trial.values(), unit) > budget.limit:
                high = middle
            else:
                low = middle
            if high - low <= Fraction(1, whole):
                chosen = choose(low)
        return chosen


def _largest_below(curve: Curve, limit: Fraction, budget: Budget) -> Option:
    fitting = [i for i, cost in enumerate(curve.costs(budget.unit)) if cost < limit]
    return curve.options[fitting[-1] if fitting else 0]
