"""Shared by policies: the registry, checks and costs of curves, rounding to aligned sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ..errors import LowrankError, listed, unknown
from ..types import Allocation, Budget, Comparing, Curve, Judging, Option, Policy, Probe, Unit

Choice = dict[tuple[str, ...], Option]
POLICIES: dict[str, Callable[[], Policy]] = {}  # filled in __init__.py
LOSSLESS = 0.01  # the share of a site's budget that default alignment may cost


def policy_of(given: str | Policy) -> Policy:
    """The policy of a name; a callable is returned as it is."""
    if isinstance(given, str):
        if given not in POLICIES:
            raise unknown("policy", given, POLICIES)
        return POLICIES[given]()
    if not callable(given):
        raise LowrankError(f"a policy is a name or a callable, got {type(given).__name__}")
    return given


def judges(given: str | Policy) -> bool:
    """Whether a policy compares allocations by the model's predictions; True if not declared."""
    policy = policy_of(given)
    return policy.judges if isinstance(policy, Judging) else True


def measured(probe: Probe, allocations: Sequence[Allocation]) -> list[float]:
    """The probe's value of each allocation; all at once if it can."""
    if isinstance(probe, Comparing):
        return probe.compare(allocations)
    return [probe(allocation) for allocation in allocations]


def disjoint(curves: Sequence[Curve]) -> dict[tuple[str, ...], Curve]:
    """Curves by their sites.

    Raises:
        LowrankError: there are no curves, or a site is in two of them.
    """
    if not curves:
        raise LowrankError("there is nothing to allocate: no site can be factored")
    covered: set[str] = set()
    for curve in curves:
        repeated = covered.intersection(curve.sites)
        if repeated:
            raise LowrankError(f"{listed(sorted(repeated))}: in more than one curve")
        covered.update(curve.sites)
    return {curve.sites: curve for curve in curves}


def spent(options: Iterable[Option], unit: Unit) -> int:
    return sum(option.cost.of(unit) for option in options)


def smallest(curves: Sequence[Curve], unit: Unit) -> int:
    """The least total cost that these curves allow."""
    return sum(min(curve.costs(unit)) for curve in curves)


def check_reachable(curves: Sequence[Curve], budget: Budget) -> None:
    """Raises LowrankError when not even the smallest options fit the budget."""
    least = smallest(curves, budget.unit)
    if least > budget.limit:
        raise LowrankError(
            f"these sites need at least {least:,} {budget.unit}, the budget is {budget.limit:,}: "
            "increase it"
        )


def at_most(curve: Curve, rank: int) -> Option | None:
    """The largest factored option of rank ≤ `rank`; None if there is none. Sizes of several
    numbers do not count."""
    largest_first = reversed(curve.options)
    fits = (o for o in largest_first if o.size and len(o.size) == 1 and o.size[0] <= rank)
    return next(fits, None)


def gated(curve: Curve, rank: int) -> Option:
    """The factored option of that rank where it is smaller than the dense weight, else dense."""
    below = at_most(curve, rank)
    if below is None or below.size is None:
        return curve.options[0]
    # A curve may lack this exact rank (alignment, ties): its cost follows from the one below.
    known, per_rank = below.size[0], below.cost.params
    if below.storage == "pivoted":  # r(m + n − r)
        per_rank -= known * (rank - known)
    grows = rank * per_rank >= known * curve.dense.cost.params
    return curve.dense if grows and below.error > 0 else below


def least_that_fits(
    thresholds: Sequence[float], choose: Callable[[float], Choice], budget: Budget, policy: str
) -> Choice:
    """The choice at the least threshold that fits the budget; costs fall as thresholds rise.

    Raises:
        LowrankError: not even the largest threshold fits.
    """
    low, high = 0, len(thresholds) - 1
    best = choose(thresholds[high])
    if spent(best.values(), budget.unit) > budget.limit:
        reached = spent(best.values(), budget.unit)
        raise LowrankError(
            f"{policy} needs at least {reached:,} {budget.unit}, the budget is {budget.limit:,}: "
            "increase it, or use another policy"
        )
    while low < high:
        middle = (low + high) // 2
        chosen = choose(thresholds[middle])
        if spent(chosen.values(), budget.unit) <= budget.limit:
            high, best = middle, chosen
        else:
            low = middle + 1
    return best


def only_aligned(curves: Sequence[Curve], align: int) -> list[Curve]:
    """The curves without sizes that are not multiples of `align`."""
    return [
        replace(
            curve,
            options=tuple(
                o for o in curve.options if o.size is None or all(n % align == 0 for n in o.size)
            ),
        )
        for curve in curves
    ]


def nearly_free_alignment(
    curves: Sequence[Curve], allocation: Allocation, unit: Unit, multiple: int = 8
) -> Allocation:
    """Ranks rounded down to a multiple where that loses less than 1 % of the site's budget."""
    by_sites = {curve.sites: curve for curve in curves}
    aligned: Choice = {}
    for sites, option in allocation.items():
        aligned[sites] = option
        if option.size is None or len(option.size) != 1 or option.size[0] % multiple == 0:
            continue
        # Another form of this rank may cost more: only the chosen one is rounded.
        rounded = (option.size[0] // multiple * multiple,)
        budget = option.cost.of(unit)
        for lower in by_sites[sites].options:
            same = (lower.size, lower.storage) == (rounded, option.storage)
            if same and 0 <= budget - lower.cost.of(unit) < LOSSLESS * budget:
                aligned[sites] = lower
    return aligned
