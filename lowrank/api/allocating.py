"""Which option every target gets: pinned or fixed ranks, or a budget, a policy and a judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from torch import nn

from ..calibration.batches import ROWS
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError, listed
from ..measure.eval import NotFinite
from ..methods.resolved import Resolved, own_form
from ..plans.entry import Entry, break_even, check_rank
from ..policies import Energy, policy_of
from ..policies.common import Choice, at_most, nearly_free_alignment, only_aligned, smallest
from ..recover.chain import Workbench
from ..recover.run import recover_layers
from ..types import Allocation, Budget, Cost, Curve, Option, Probe, Site
from ..walk.sites import pattern_value
from ..walk.surgery import put, twin
from .grouping import Group
from .request import Request

Curves = dict[str, Curve]
PROBED = 96  # rows that a candidate's closed-form recovery is fitted to: enough to compare by


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
    chosen = policy_of(request.policy or "uniform")(free, budget, judge)
    forgotten = [site.title for site in sites if site.names not in chosen]
    if forgotten:
        raise LowrankError(f"the policy chose no option for {listed(forgotten)}")
    if request.align is None:
        chosen = nearly_free_alignment(free, chosen, request.unit)
    return {**chosen, **pinned}


def why_dense(option: Option, site: Site, curve: Curve, request: Request) -> str:
    """Why a target stays dense, in a few words; "" if it does not."""
    if not option.dense:
        return ""
    largest, rank = break_even(site.shape, *request.stored(site)) - 1, request.rank
    form = own_form(request.method)
    if len(curve.options) == 1:
        sizes = "size of this form" if form else "rank"
        return f"no {sizes} makes a weight of this shape smaller"
    if isinstance(rank, float):
        size = "a size that" if form else f"a rank above {largest}, which"
        return f"keeping {rank} of its energy takes {size} is not smaller"
    if rank is not None and rank > largest:
        return f"at rank {rank} it would not be smaller; the largest that is: {largest}"
    if request.align is not None and largest < request.align:
        return f"no multiple of {request.align} makes it smaller; the largest rank is {largest}"
    return "not in rank_pattern" if request.ratio is None else "the policy keeps it dense"


def workbench(
    model: nn.Module, calibration: Calibration | None, request: Request
) -> Workbench | None:
    """Where what is tried can be fitted and judged; None where there are no rows to run."""
    if calibration is None or callable(calibration.batches):
        return None
    recovery = request.recovery
    return Workbench(model, calibration, ROWS if recovery is None else recovery.rows)


def probe_of(
    bench: Workbench,
    groups: Mapping[tuple[str, ...], Group],
    resolved: Resolved,
    request: Request,
) -> Probe:
    """Held-out KL of the model with an allocation.

    All happens in a twin. Where recovery follows, its closed form does here too: what is better
    before it need not be after.

    Args:
        groups: by the names that an allocation gives them.
    """
    recovery = request.recovery
    closed = recovery and replace(recovery, block_steps=0, distill_steps=0)

    def tried(allocation: Allocation) -> list[tuple[Site, Entry, nn.Module]]:
        work = []
        for names, group in groups.items():
            option = allocation[names]
            if not option.dense:
                stats = statistics_of(group[0], bench.calibration)
                new = resolved.factor(group, option, stats)
                work += [
                    (site, Entry.of(site, option), module)
                    for site, module in zip(group, new, strict=True)
                ]
        return work

    def probe(allocation: Allocation) -> float:
        work = tried(allocation)
        modules = {site.name: new for site, _, new in work}
        if closed is not None and work:
            few = max(PROBED // closed.rows, 1)
            modules = recover_layers(
                bench, work, closed, resolved, most=few, progress=False
            ).modules
        lean = twin(bench.model)
        for site, _, _ in work:
            put(lean, site, modules[site.name])
        try:
            return bench.judge.judged(lean)
        except NotFinite:
            raise
        except LowrankError as error:
            raise LowrankError(f"{error}; policy='uniform' compares nothing") from None

    return probe


def _pinned(request: Request, sites: Sequence[Site], curves: Curves) -> Choice:
    """The options that `rank_pattern` fixes; above break-even is an error here."""
    options: Choice = {}
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
        options[site.names] = option
    return options


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
    options = {}
    for site, curve in zip(sites, curves, strict=True):
        # A rank that the curve lacks carries nothing more than the one below it.
        option = at_most(curve, rank)
        smaller = option is not None and rank < break_even(site.shape, *request.stored(site))
        options[site.names] = option if option is not None and smaller else curve.dense
    return options


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
