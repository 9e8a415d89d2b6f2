"""One option for every site, least total error within the budget: the multiple-choice knapsack.

    min Σ error_j(option_j)  subject to  Σ cost_j(option_j) ≤ limit

The Lagrangian relaxation charges λ per unit of cost; each site then takes the option of least
error + λ · cost. As λ falls, a site moves along the lower convex hull of its (cost, error) points,
one step whenever λ reaches the error that the step saves per unit (Sinha and Zoltners, Operations
Research 27(3), 1979). So the steps of all hulls are taken in descending order of that rate, up to
the first that does not fit. The rest of the budget is spent greedily by the same rate, on any
option. `benchmarks/knapsack.py` compares this with the two solvers that it replaced.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from heapq import merge
from itertools import pairwise
from typing import NamedTuple

from ..errors import LowrankError
from ..types import Budget, Curve, Option
from .common import Choice, check_reachable, disjoint

Sites = tuple[str, ...]


class Solution(NamedTuple):
    """An allocation, and a lower bound for its error.

    Attributes:
        choice: an option of its own curve for every site, within the budget.
        error: weighted total of the choice.
        bound: no allocation within the budget has an error below it (the Lagrangian dual).
    """

    choice: Choice
    error: float
    bound: float


class _Point(NamedTuple):
    cost: int
    error: float
    option: Option


Points = Mapping[Sites, list[_Point]]


class _Step(NamedTuple):
    rate: float  # error saved per unit of cost
    sites: Sites
    point: _Point  # the point after the step


def solve(
    curves: Sequence[Curve],
    budget: Budget,
    *,
    weights: Mapping[Sites, float] | None = None,
    floors: Mapping[Sites, int] | None = None,
) -> Solution:
    """Options of nearly least total error within the budget, independent of the curves' order.

    Args:
        weights: factor ≥ 0 of a curve's errors, by its sites; 1 by default.
        floors: least cost of a curve's option, by its sites; the dense weight is always allowed.

    Raises:
        LowrankError: no curves, a site in two of them, errors in different norms, or a budget below
            the smallest options that the floors allow.
    """
    by_sites = disjoint(curves)
    check_norms(curves)
    check_reachable(curves, budget)
    points = {
        sites: _points(by_sites[sites], budget, (weights or {}).get(sites, 1.0), floors or {})
        for sites in sorted(by_sites)
    }
    least = sum(every[0].cost for every in points.values())
    if least > budget.limit:
        raise LowrankError(
            f"the floors need at least {least:,} {budget.unit}, the budget is {budget.limit:,}"
        )
    chosen, bound = _relaxed(points, budget.limit)
    _fill(points, chosen, budget.limit)
    error = math.fsum(point.error for point in chosen.values())
    return Solution({sites: chosen[sites].option for sites in by_sites}, error, bound)


def check_norms(curves: Sequence[Curve]) -> None:
    """Raises LowrankError if errors are in different norms."""
    norms = sorted({curve.norm for curve in curves})
    if len(norms) > 1:
        raise LowrankError(
            f"errors in different norms cannot be added: {', '.join(norms)}; "
            "use one method for all sites"
        )


def _points(
    curve: Curve, budget: Budget, weight: float, floors: Mapping[Sites, int]
) -> list[_Point]:
    """The Pareto front of the options above the floor: cost rises, error falls."""
    least = min(floors.get(curve.sites, 0), curve.dense.cost.of(budget.unit))
    every = (_Point(o.cost.of(budget.unit), weight * o.error, o) for o in curve.options)
    points: list[_Point] = []
    for point in sorted(every, key=lambda point: point[:2]):
        if point.cost >= least and (not points or point.error < points[-1].error):
            points.append(point)
    return points


def _relaxed(points: Points, limit: int) -> tuple[dict[Sites, _Point], float]:
    """The choice at the least price λ that fits the budget, and the dual bound at that price."""
    chosen = {sites: every[0] for sites, every in points.items()}
    left = limit - sum(point.cost for point in chosen.values())
    price = 0.0
    steps = (_steps(sites, every) for sites, every in points.items())
    for step in merge(*steps, key=lambda step: -step.rate):  # a site's own steps stay in order
        extra = step.point.cost - chosen[step.sites].cost
        if extra > left:
            price = step.rate
            break
        chosen[step.sites] = step.point
        left -= extra
    return chosen, math.fsum(point.error for point in chosen.values()) - price * left


def _steps(sites: Sites, points: Sequence[_Point]) -> Iterator[_Step]:
    """The steps along the lower convex hull."""
    corners: list[_Point] = []
    for point in points:
        while len(corners) > 1 and _rate(corners[-2], point) >= _rate(corners[-2], corners[-1]):
            corners.pop()
        corners.append(point)
    for before, after in pairwise(corners):
        yield _Step(_rate(before, after), sites, after)


def _fill(points: Points, chosen: dict[Sites, _Point], limit: int) -> None:
    """Spend the rest where it saves the most error per unit, until no larger option fits."""
    left = limit - sum(point.cost for point in chosen.values())
    while True:
        fitting = (
            _Step(_rate(chosen[sites], point), sites, point)
            for sites, every in points.items()
            for point in every
            if 0 < point.cost - chosen[sites].cost <= left
        )
        best = max(fitting, key=lambda step: step.rate, default=None)
        if best is None:
            return
        left -= best.point.cost - chosen[best.sites].cost
        chosen[best.sites] = best.point


def _rate(before: _Point, after: _Point) -> float:
    return (before.error - after.error) / (after.cost - before.cost)
