"""Ranks by what each costs the model's predictions, checked against uniform ranks.

Minimise Σ error under the budget, every site with its dense option, over curves whose errors are
comparable across sites: norms "fisher" and "kl" are, as second-order estimates of the KL to the
dense model (IO-SVD, OBD-LLM, LEMS). Other norms are scaled by measured KL, one site at a time;
without a probe they say nothing across sites, and ranks stay uniform. Far from the dense model a
second-order estimate is wrong, so that the probe compares the result with uniform ranks, and with
those of the least sum of relative errors (each site's share of its own energy, which is what works
on convolutional networks: benchmarks/results), and the best one is kept.

A site may stand in several curves, alone or in a group that covers exactly some sites: every site
is covered once. Solved as a multiple-choice knapsack by Lagrangian relaxation: the choice is
optimal but for the budget that no option could use up (`solve` states the gap).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import LowrankError, listed
from ..types import Allocation, Budget, Curve, Option, Probe
from .common import Choice, check_reachable, spent
from .uniform import Uniform

COMPARABLE = frozenset({"fisher", "kl"})
HALVINGS = 200
MOST = 1e6  # nats; an infinite KL times an error of zero would be no number


@dataclass(frozen=True)
class LossAware:
    """Options.

    Attributes:
        share: of its own cost that a site alone is brought to when its KL is measured, in (0, 1).
        floor: the least share of its uniform cost that any site keeps, in [0, 1).
    """

    share: float = 0.7
    floor: float = 0.0

    judges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("floor", self.floor)):
            if not 0 <= value < 1 or (name == "share" and value == 0):
                raise LowrankError(f"{name} of lossaware must be in (0, 1), got {value}")

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        check_norms(curves)
        single = _partition(curves)
        _check_groups(curves, single)
        check_reachable(single, budget)
        uniform = dict(Uniform()(single, budget))
        scaled = curves
        if curves[0].norm not in COMPARABLE:
            if probe is None:
                return uniform
            scaled = [_scaled(curve, single, budget, probe, self.share) for curve in curves]
        floors = {s: int(self.floor * o.cost.of(budget.unit)) for s, o in uniform.items()}
        found, _ = solve(scaled, budget, floors)
        found = _originals(found, curves)
        if probe is None:
            return found
        relative, _ = solve([_relative(curve) for curve in curves], budget, floors)
        tried = [found, uniform, _originals(relative, curves)]
        different = [one for i, one in enumerate(tried) if one not in tried[:i]]
        return different[0] if len(different) == 1 else min(different, key=probe)


def solve(
    curves: Sequence[Curve], budget: Budget, floors: Mapping[tuple[str, ...], int] | None = None
) -> tuple[Choice, float]:
    """The allocation of least total error, and by how much a better one could be smaller.

    Args:
        floors: by the sites of a curve, the least cost that its option may have.

    Returns:
        The choice, and the duality gap: no allocation within the budget has an error below
        error(choice) − gap.
    """
    clusters = _clusters(curves, budget, floors or {})

    def choose(price: float) -> list[Choice]:
        return [_cheapest(covers, budget, price) for covers in clusters]

    low, high = 0.0, 1.0
    while _cost(choose(high), budget) > budget.limit and high < 1e30:
        high *= 16
    low = 0.0 if high == 1.0 else high / 16
    if _cost(choose(low), budget) <= budget.limit:
        low, high = 0.0, low
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high) if low > 0 else high / 1024
        if _cost(choose(middle), budget) <= budget.limit:
            high = middle
        else:
            low = middle
        if high - low <= 1e-12 * high or high < 1e-30:
            break
    chosen = choose(high)
    bound = sum(_value(c, budget, high) for c in chosen) - high * budget.limit
    chosen = _filled(clusters, chosen, budget)
    found: Choice = {}
    for cover in chosen:
        found.update(cover)
    return found, max(sum(o.error for o in found.values()) - bound, 0.0)


def check_norms(curves: Sequence[Curve]) -> None:
    """Raises LowrankError where there is no curve, or errors in different norms."""
    norms = sorted({curve.norm for curve in curves})
    if len(norms) > 1:
        raise LowrankError(f"errors in different norms cannot be added: {', '.join(norms)}")
    if not norms:
        raise LowrankError("there is nothing to allocate: no site can be factored")


def _partition(curves: Sequence[Curve]) -> list[Curve]:
    """The curves of the fewest sites that cover every site once: singles before groups."""
    found: list[Curve] = []
    seen: set[str] = set()
    for curve in sorted(curves, key=lambda c: len(c.sites)):
        if not seen.intersection(curve.sites):
            seen.update(curve.sites)
            found.append(curve)
    return found


def _check_groups(curves: Sequence[Curve], single: Sequence[Curve]) -> None:
    """Raises LowrankError unless every group consists of whole sites, in one group only."""
    parts = [set(curve.sites) for curve in single]
    grouped: set[str] = set()
    for group in curves:
        if any(group is curve for curve in single):
            continue
        names = set(group.sites)
        whole = set().union(*(part for part in parts if part <= names))
        if names - whole or names & grouped:
            twice = sorted(names & (set().union(*parts) | grouped))
            raise LowrankError(
                f"{listed(twice)}: in more than one curve, and the group {group.sites} is not made "
                "of whole sites that stand in no other group"
            )
        grouped |= names


def _clusters(
    curves: Sequence[Curve], budget: Budget, floors: Mapping[tuple[str, ...], int]
) -> list[list[Choice]]:
    """Per set of sites that hang together: every way to cover it, as choices.

    Singles are independent of each other, so that a cluster of them is one curve. A group of sites
    offers its own options beside the best singles; those are priced together, option by option.
    """
    found: list[list[Choice]] = []
    for curve in _partition(curves):
        least = min(floors.get(curve.sites, 0), curve.dense.cost.of(budget.unit))
        options = [o for o in curve.options if o.cost.of(budget.unit) >= least]
        found.append([{curve.sites: option} for option in options])
    groups = [c for c in curves if not any(c.sites == next(iter(f[0])) for f in found)]
    for group in groups:
        inside = [f for f in found if set(next(iter(f[0]))) <= set(group.sites)]
        found = [f for f in found if not any(f is one for one in inside)]
        found.append(_front(inside, budget) + [{group.sites: o} for o in group.options])
    return found


def _front(parts: Sequence[list[Choice]], budget: Budget) -> list[Choice]:
    """Choices for several sites together: the least error at every price of a unit."""
    slopes = {
        abs(b[0] - a[0]) / abs(b[1] - a[1])
        for part in parts
        for a, b in zip(_points(part, budget), _points(part, budget)[1:], strict=False)
        if a[1] != b[1]
    }
    found = []
    for price in sorted(slopes | {0.0}):
        for shade in (1 - 1e-9, 1 + 1e-9):
            joined: Choice = {}
            for part in parts:
                joined.update(_cheapest(part, budget, price * shade))
            if joined not in found:
                found.append(joined)
    return found


def _points(part: Sequence[Choice], budget: Budget) -> list[tuple[float, int]]:
    return [(_error(choice), spent(choice.values(), budget.unit)) for choice in part]


def _filled(clusters: list[list[Choice]], chosen: list[Choice], budget: Budget) -> list[Choice]:
    """What is left of the budget goes where it takes away the most error per unit."""
    chosen = list(chosen)
    while True:
        left = budget.limit - _cost(chosen, budget)
        best: tuple[float, int, Choice] | None = None
        for index, covers in enumerate(clusters):
            error, cost = _error(chosen[index]), spent(chosen[index].values(), budget.unit)
            for cover in covers:
                more = spent(cover.values(), budget.unit) - cost
                less = error - _error(cover)
                if 0 < more <= left and less > 0 and (best is None or less / more > best[0]):
                    best = (less / more, index, cover)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]


def _scaled(
    curve: Curve, single: Sequence[Curve], budget: Budget, probe: Probe, share: float
) -> Curve:
    """Errors as KL: what the sites of this curve alone cost at one size fixes the scale."""
    limit = share * curve.dense.cost.of(budget.unit)
    fitting = [o for o in curve.options if not o.dense and o.cost.of(budget.unit) <= limit]
    option = fitting[-1] if fitting else curve.options[0]
    if option.dense or option.error <= 0:
        return replace(curve, norm="kl")
    trial: Choice = {c.sites: c.dense for c in single if not set(c.sites) & set(curve.sites)}
    scale = min(max(probe({**trial, curve.sites: option}), 0.0), MOST) / option.error
    options = tuple(replace(o, error=o.error * scale) for o in curve.options)
    return replace(curve, options=options, norm="kl", total=curve.total * scale)


def _relative(curve: Curve) -> Curve:
    """Errors as shares of the zero matrix's."""
    total = curve.total or 1.0
    options = tuple(replace(o, error=o.error / total) for o in curve.options)
    return replace(curve, options=options, total=curve.total / total)


def _originals(found: Choice, curves: Sequence[Curve]) -> Choice:
    """Options with the errors of their own curves again."""
    by_sites = {curve.sites: curve for curve in curves}
    return {
        sites: next(
            o
            for o in by_sites[sites].options
            if (o.method, o.size, o.storage) == (option.method, option.size, option.storage)
        )
        for sites, option in found.items()
    }


def _cheapest(covers: Sequence[Choice], budget: Budget, price: float) -> Choice:
    return min(covers, key=lambda choice: _value(choice, budget, price))


def _value(choice: Choice, budget: Budget, price: float) -> float:
    return _error(choice) + price * spent(choice.values(), budget.unit)


def _error(choice: Mapping[tuple[str, ...], Option]) -> float:
    return sum(option.error for option in choice.values())


def _cost(chosen: Sequence[Choice], budget: Budget) -> int:
    return sum(spent(choice.values(), budget.unit) for choice in chosen)
