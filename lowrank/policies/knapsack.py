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
from array import array
from collections.abc import Iterator, Mapping, Sequence
from heapq import merge
from itertools import pairwise
from typing import NamedTuple

from ..errors import LowrankError
from ..types import Budget, Curve
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


class _Front(NamedTuple):
    """The Pareto front of a site's options, in arrays: cost rises, error falls."""

    costs: array[int]
    errors: array[float]
    numbers: array[int]  # of the options in the curve

    def rate(self, before: int, after: int) -> float:
        """The error saved per unit of cost from one point to another."""
        saved = self.errors[before] - self.errors[after]
        return saved / (self.costs[after] - self.costs[before])


Fronts = Mapping[Sites, _Front]
Points = dict[Sites, int]  # of each front


class _Step(NamedTuple):
    rate: float  # error saved per unit of cost
    sites: Sites
    point: int  # the point after the step


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
    fronts = {
        sites: _front(by_sites[sites], budget, (weights or {}).get(sites, 1.0), floors or {})
        for sites in sorted(by_sites)
    }
    least = sum(front.costs[0] for front in fronts.values())
    if least > budget.limit:
        raise LowrankError(
            f"the floors need at least {least:,} {budget.unit}, the budget is {budget.limit:,}"
        )
    chosen, bound = _relaxed(fronts, budget.limit)
    _fill(fronts, chosen, budget.limit)
    numbers = {sites: fronts[sites].numbers[point] for sites, point in chosen.items()}
    choice = {sites: curve.options[numbers[sites]] for sites, curve in by_sites.items()}
    return Solution(choice, _error(fronts, chosen), bound)


def check_norms(curves: Sequence[Curve]) -> None:
    """Raises LowrankError if errors are in different norms."""
    norms = sorted({curve.norm for curve in curves})
    if len(norms) > 1:
        raise LowrankError(
            f"errors in different norms cannot be added: {', '.join(norms)}; "
            "use one method for all sites"
        )


def _front(curve: Curve, budget: Budget, weight: float, floors: Mapping[Sites, int]) -> _Front:
    """The Pareto front of the options above the floor."""
    costs, errors = curve.costs(budget.unit), curve.errors
    least = min(floors.get(curve.sites, 0), costs[-1])
    front = _Front(array("q"), array("d"), array("Q"))
    for number in sorted(range(len(costs)), key=lambda n: (costs[n], weight * errors[n])):
        cost, error = costs[number], weight * errors[number]
        if cost >= least and (not front.errors or error < front.errors[-1]):
            front.costs.append(cost)
            front.errors.append(error)
            front.numbers.append(number)
    return front


def _relaxed(fronts: Fronts, limit: int) -> tuple[Points, float]:
    """The choice at the least price λ that fits the budget, and the dual bound at that price."""
    chosen = dict.fromkeys(fronts, 0)
    left = limit - _cost(fronts, chosen)
    price = 0.0
    steps = (_steps(sites, front) for sites, front in fronts.items())
    for step in merge(*steps, key=lambda step: -step.rate):  # a site's own steps stay in order
        costs = fronts[step.sites].costs
        extra = costs[step.point] - costs[chosen[step.sites]]
        if extra > left:
            price = step.rate
            break
        chosen[step.sites] = step.point
        left -= extra
    return chosen, _error(fronts, chosen) - price * left


def _steps(sites: Sites, front: _Front) -> Iterator[_Step]:
    """The steps along the lower convex hull."""
    corners: list[int] = []
    for point in range(len(front.costs)):
        while len(corners) > 1 and (
            front.rate(corners[-2], point) >= front.rate(corners[-2], corners[-1])
        ):
            corners.pop()
        corners.append(point)
    for before, after in pairwise(corners):
        yield _Step(front.rate(before, after), sites, after)


def _fill(fronts: Fronts, chosen: Points, limit: int) -> None:
    """Spend the rest where it saves the most error per unit, until no larger option fits."""
    left = limit - _cost(fronts, chosen)
    while True:
        fitting = (
            _Step(front.rate(chosen[sites], point), sites, point)
            for sites, front in fronts.items()
            for point, cost in enumerate(front.costs)
            if 0 < cost - front.costs[chosen[sites]] <= left
        )
        best = max(fitting, key=lambda step: step.rate, default=None)
        if best is None:
            return
        costs = fronts[best.sites].costs
        left -= costs[best.point] - costs[chosen[best.sites]]
        chosen[best.sites] = best.point


def _cost(fronts: Fronts, chosen: Points) -> int:
    return sum(fronts[sites].costs[point] for sites, point in chosen.items())


def _error(fronts: Fronts, chosen: Points) -> float:
    return math.fsum(fronts[sites].errors[point] for sites, point in chosen.items())
