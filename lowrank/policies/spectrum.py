"""Least total error under the budget, from the sites' own error curves.

min Σ error_j(option_j) subject to Σ cost_j(option_j) ≤ limit, dense being an option like any
other. The Lagrangian relaxation takes the steps of each curve's lower convex hull in the order of
error saved per unit of cost; what the last step leaves over is then spent greedily, dense included.

Comparing raw errors across sites is worse than uniform on language models and much better on
convolutional networks: see benchmarks. Norms are never mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from ..errors import LowrankError
from ..types import Allocation, Budget, Curve, Option, Probe, Unit
from .common import check_reachable, disjoint, smallest


@dataclass(frozen=True)
class Spectrum:
    """No options."""

    judges: ClassVar[bool] = False

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        by_sites = disjoint(curves)
        norms = sorted({curve.norm for curve in curves})
        if len(norms) > 1:
            raise LowrankError(
                f"errors in the norms {norms} cannot be added: use one method for all sites"
            )
        check_reachable(curves, budget)
        chosen = {sites: _cheapest(curve, budget.unit) for sites, curve in by_sites.items()}
        left = budget.limit - smallest(curves, budget.unit)
        steps = sorted(
            (
                (gain, sites, option)
                for sites, curve in by_sites.items()
                for gain, option in _hull(curve, budget.unit)
                if gain > 0  # a dense weight without error saves nothing over exact factors
            ),
            key=lambda step: -step[0],
        )
        stopped: set[tuple[str, ...]] = set()
        for _, sites, option in steps:
            extra = option.cost.of(budget.unit) - chosen[sites].cost.of(budget.unit)
            if sites in stopped or extra > left:
                stopped.add(sites)  # its later steps build on this one
                continue
            chosen[sites] = option
            left -= extra
        _spend(by_sites, chosen, left, budget.unit)
        return chosen


def _cheapest(curve: Curve, unit: Unit) -> Option:
    return min(curve.options, key=lambda option: option.cost.of(unit))


def _hull(curve: Curve, unit: Unit) -> list[tuple[float, Option]]:
    """Steps along the lower convex hull: (error saved per unit of cost, option reached)."""
    corners: list[Option] = []
    for option in curve.options:
        while len(corners) > 1 and _slope(corners[-2], option, unit) >= _slope(
            corners[-2], corners[-1], unit
        ):
            corners.pop()
        corners.append(option)
    return [(_slope(before, after, unit), after) for before, after in pairwise(corners)]


def _slope(before: Option, after: Option, unit: Unit) -> float:
    """Error saved per unit; a step that costs nothing comes first."""
    extra = after.cost.of(unit) - before.cost.of(unit)
    saved = before.error - after.error
    return saved / extra if extra > 0 else float("inf")


def _spend(
    by_sites: dict[tuple[str, ...], Curve],
    chosen: dict[tuple[str, ...], Option],
    left: int,
    unit: Unit,
) -> None:
    """Spend what is left on the single change that saves most, again and again."""
    while True:
        best: tuple[float, tuple[str, ...], Option] | None = None
        for sites, curve in by_sites.items():
            limit = chosen[sites].cost.of(unit) + left
            option = min(
                (o for o in curve.options if o.cost.of(unit) <= limit), key=lambda o: o.error
            )
            saved = chosen[sites].error - option.error
            if saved > 0 and (best is None or saved > best[0]):
                best = (saved, sites, option)
        if best is None:
            return
        _, sites, option = best
        left -= option.cost.of(unit) - chosen[sites].cost.of(unit)
        chosen[sites] = option
