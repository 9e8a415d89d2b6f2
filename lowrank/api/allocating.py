"""Which option every target gets: pinned ranks, fixed ranks, or a budget and a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from ..errors import LowrankError, listed
from ..methods.resolved import own_form
from ..plans.entry import break_even, check_rank
from ..policies import Energy, policy_of
from ..policies.common import Choice, at_most, nearly_free_alignment, only_aligned, smallest
from ..types import Allocation, Budget, Cost, Curve, Probe, Site
from ..walk.sites import pattern_value
from .request import Request

Curves = dict[str, Curve]


def allocate(
    request: Request,
    goal: int,
    targets: Sequence[Site],
    curves: Curves,
    whole: Cost,
    probe: Probe | None = None,
) -> Allocation:
    """One option for every target; `goal` is the dense cost that the ratio refers to.

    A group of sites with one curve is one target here, under the names of all (`stacked`).
    """
    pinned = _pinned(request, targets, curves)
    sites = [site for site in targets if site.names not in pinned]
    free = [curves[site.name] for site in sites]
    if request.align is not None and not isinstance(request.rank, int):
        free = only_aligned(free, request.align)
    if request.rank is not None:
        return {**_fixed(request.rank, request, sites, free), **pinned}
    if request.ratio is None or not free:
        return {**{curve.sites: curve.dense for curve in free}, **pinned}
    total = goal if request.of == "targets" else whole.of(request.unit)
    kept = sum(option.cost.of(request.unit) for option in pinned.values())
    before = sum(curve.dense.cost.of(request.unit) for curve in curves.values())
    # Beside the free sites stand the pinned ones at their new cost and all else as it is.
    budget = _budget(request, total, total - before + kept, free)
    dense = {site.names: curves[site.name].dense for site in targets}

    def beside_pinned(allocation: Allocation) -> float:
        assert probe is not None
        return probe({**dense, **pinned, **allocation})

    judge = None if probe is None else beside_pinned
    found = policy_of(request.policy or "uniform")(free, budget, judge)
    forgotten = [site.title for site in sites if site.names not in found]
    if forgotten:
        raise LowrankError(f"the policy chose no option for {listed(forgotten)}")
    if request.align is None:
        found = nearly_free_alignment(free, found, request.unit)
    return {**found, **pinned}


def _pinned(request: Request, sites: Sequence[Site], curves: Curves) -> Choice:
    """The options that `rank_pattern` fixes; above break-even is an error here."""
    found: Choice = {}
    patterns = request.rank_pattern or {}
    for site in sites:
        key = pattern_value(patterns, site.names)
        if key is None:
            continue
        value = patterns[key]
        _check_one_rank(patterns, site)
        if isinstance(value, int):
            check_rank(site.title, site.shape, value, *request.stored(site))
        option = _fixed(value, request, [site], [curves[site.name]])[site.names]
        if option.dense:
            even = break_even(site.shape, *request.stored(site))
            takes = "a size" if own_form(request.method) else f"a rank of {even} or more,"
            raise LowrankError(
                f"rank_pattern {key!r}: keeping {value} of the energy of {site.title} takes {takes}"
                " which is not smaller than the dense layer"
            )
        found[site.names] = option
    return found


def _check_one_rank(patterns: Mapping[str, int | float], site: Site) -> None:
    """Members of a group share one basis, so that naming one of them is enough, and two disagree.

    Raises:
        LowrankError: their first keys give different ranks.
    """
    keys = [pattern_value(patterns, [name]) for name in site.names]
    given = {key: patterns[key] for key in keys if key is not None}
    if len(site.modules) > 1 and len(set(given.values())) > 1:
        raise LowrankError(
            f"rank_pattern gives {listed(site.names, 4)} different ranks ({given}), but they share "
            "one basis or one weight: give one rank"
        )


def _fixed(
    rank: int | float, request: Request, sites: Sequence[Site], curves: Sequence[Curve]
) -> Choice:
    """An integer is a rank for all; a float is the share of its energy that every site keeps."""
    if isinstance(rank, float):
        return dict(Energy(share=rank)(curves, Budget(0))) if curves else {}
    found = {}
    for site, curve in zip(sites, curves, strict=True):
        # A rank that the curve lacks carries nothing more than the one below it.
        option = at_most(curve, rank)
        smaller = option is not None and rank < break_even(site.shape, *request.stored(site))
        found[site.names] = option if option is not None and smaller else curve.dense
    return found


def _budget(request: Request, total: int, rest: int, free: Sequence[Curve]) -> Budget:
    """What is left for the sites that the policy may choose for, `rest` being fixed.

    Raises:
        LowrankError: not even the smallest options fit; the smallest reachable ratio is named.
    """
    # The decimal that was written, not its binary neighbour: 0.29 · 100 is 29.
    limit = math.floor(Fraction(str(request.ratio)) * total) - rest
    least = smallest(free, request.unit)
    if limit >= least:
        return Budget(limit, request.unit)
    cannot = f"ratio {request.ratio} of the {request.of} cannot be reached"
    reachable = math.ceil(Fraction(rest + least, total) * 10_000) / 10_000
    if reachable >= 1:
        of = "" if request.align is None else f" that is a multiple of {request.align}"
        raise LowrankError(f"{cannot}: no rank{of} makes any target smaller")
    raise LowrankError(
        f"{cannot}: with every target as small as it can be, {reachable:.4f} of the "
        f"{request.unit} are kept; ask for at least that"
    )
