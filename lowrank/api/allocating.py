"""Choose an option for every target: from fixed ranks, or by a policy under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from torch import nn

from ..calibration.batches import ROWS, rows_in
from ..calibration.chain import Recordings
from ..calibration.processes import dealt
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError, listed
from ..linalg.mapped import settled
from ..measure.eval import NotFinite
from ..methods.resolved import Resolved, own_form
from ..plans.entry import Entry, break_even, check_rank
from ..policies import Energy, policy_of
from ..policies.common import (
    Choice,
    at_most,
    measured,
    nearly_free_alignment,
    only_aligned,
    smallest,
)
from ..recover.job import ROUNDING
from ..recover.recovery import Recovery
from ..recover.run import refit_makes, refitted_twins
from ..recover.workbench import Workbench
from ..types import Allocation, Budget, Cost, Curve, Option, Probe, Site
from ..walk.layouts import keeps_moments
from ..walk.sites import pattern_value
from ..walk.surgery import put, twin
from .grouping import Group
from .request import HOLD_OUT, Request

Curves = dict[str, Curve]
Work = list[tuple[Site, Entry, nn.Module | None]]
NEAR = 1.5  # times the least KL before the refit: candidates up to it are refitted and compared
LEAST_TOKENS = 4096  # to refit a candidate to, enough for a comparison
LEAST_ROWS, MOST_ROWS = 16, 96  # an image is a single token to the layers behind its pooling


def allocate(
    request: Request,
    goal: int,
    targets: Sequence[Site],
    curves: Curves,
    whole: Cost,
    probe: Probe | None = None,
) -> Allocation:
    """Choose one option for every target.

    Args:
        goal: dense cost that a ratio of the targets refers to.
        targets: a group of sites with one curve counts as one, under all names (`stacked`).
        whole: dense cost of the model, for a ratio of the model.
        probe: held-out KL of an allocation, for policies that judge.
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
    # Fixed cost: pinned sites at their new cost, everything else dense.
    budget = _budget(request, total, total - before + kept, free)
    dense = {site.names: curves[site.name].dense for site in targets}
    judge = None if probe is None else _Beside(probe, {**dense, **pinned})
    chosen = policy_of(request.policy or "uniform")(free, budget, judge)
    missing = [site.title for site in sites if site.names not in chosen]
    if missing:
        raise LowrankError(f"the policy chose no option for {listed(missing)}")
    if request.align is None:
        chosen = nearly_free_alignment(free, chosen, request.unit)
    return {**chosen, **pinned}


@dataclass(frozen=True)
class _Beside:
    """A probe of the free sites, with the others at fixed options."""

    probe: Probe
    fixed: Allocation

    def __call__(self, allocation: Allocation) -> float:
        return self.probe({**self.fixed, **allocation})

    def compare(self, allocations: Sequence[Allocation]) -> list[float]:
        return measured(self.probe, [{**self.fixed, **each} for each in allocations])


def why_dense(option: Option, site: Site, curve: Curve, request: Request) -> str:
    """Why a target stays dense, for the report; "" if it does not."""
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
        return f"not smaller at rank {rank}; the largest rank that saves is {largest}"
    if request.align is not None and largest < request.align:
        return f"no multiple of {request.align} makes it smaller; the largest rank is {largest}"
    return "not in rank_pattern" if request.ratio is None else "the policy keeps it dense"


def probed_rows(tokens: float) -> int:
    """How many rows of so many tokens candidates are refitted to."""
    return min(max(LEAST_ROWS, math.ceil(LEAST_TOKENS / max(tokens, 1))), MOST_ROWS)


def bench_of(
    model: nn.Module,
    calibration: Calibration | None,
    request: Request,
    recordings: Recordings | None = None,
) -> Workbench | None:
    """The workbench to fit and judge candidates on; None without rows to run."""
    if calibration is None or callable(calibration.batches):
        return None
    recovery = request.recovery
    rows = ROWS if recovery is None else recovery.rows
    return Workbench(model, calibration, rows, recordings)


@dataclass(frozen=True)
class Judge:
    """The held-out KL of allocations, measured in twins.

    If recovery follows, its closed-form part can change the order of candidates. So those that are
    near the best one before it get it too, on a few rows. Others do not: benchmarks/candidates.py
    prints that they stay behind.

    Attributes:
        groups: by the names under which an allocation lists them.
    """

    bench: Workbench
    groups: Mapping[tuple[str, ...], Group]
    resolved: Resolved
    recovery: Recovery | None

    def __call__(self, allocation: Allocation) -> float:
        return self.compare([allocation])[0]

    def compare(self, allocations: Sequence[Allocation]) -> list[float]:
        """The held-out KL of each; the dense model runs once for all.

        Where several are near the best before the refit: theirs after it, and for others theirs
        before it, or the largest of those if that is more.
        """
        allocations = [self._plain(each) for each in allocations]
        if self.recovery is None:
            return self._judged(self._made(allocations))
        normed = self.recovery.batchnorm and any(map(keeps_moments, self.bench.model.modules()))
        if len(allocations) == 1 or normed:  # batch norms off their moments hide what is near
            return self._judged(self._refitted(allocations, self.recovery))
        values = self._judged(self._made(allocations))
        least = min(values)
        near = [i for i, value in enumerate(values) if value <= NEAR * max(least, ROUNDING)]
        if len(near) == 1:
            return values
        after = self._judged(self._refitted([allocations[i] for i in near], self.recovery))
        values = [max(value, *after) for value in values]
        for i, value in zip(near, after, strict=True):
            values[i] = value
        return values

    def _plain(self, allocation: Allocation) -> Allocation:
        """The same with plain factors: pivoted ones are the same product, in fewer numbers."""
        return {
            names: replace(o, storage="factors") if o.storage == "pivoted" else o
            for names, o in allocation.items()
        }

    def _made(self, allocations: Sequence[Allocation]) -> list[nn.Module]:
        """A twin of each, its layers factored from the dense model's statistics."""
        works: list[Work] = [[] for _ in allocations]
        chosen = [(names, [each[names] for each in allocations]) for names in self.groups]
        made = dealt(partial(self._factored, names, options) for names, options in chosen)
        for (names, options), layers in zip(chosen, made, strict=True):
            for work, option, new in zip(works, options, layers, strict=True):
                sites = zip(self.groups[names], new, strict=True) if new else ()
                work += [(s, Entry.of(s, option), settled(module)) for s, module in sites]
        return [self._put(work) for work in works]

    def _factored(self, names: tuple[str, ...], options: Sequence[Option]) -> list[list[nn.Module]]:
        """A group's layers of each option; none of dense ones."""
        group = self.groups[names]
        stats = statistics_of(group[0], self.bench.calibration)
        factored = [option for option in options if not option.dense]
        made = iter(self.resolved.factor_each(group, factored, stats))
        return [[] if option.dense else next(made) for option in options]

    def _refitted(self, allocations: Sequence[Allocation], recovery: Recovery) -> list[nn.Module]:
        """A twin of each after closed-form recovery on a few rows."""
        rows = sum(map(rows_in, self.bench.batches[: self.bench.fitted]))
        tokens = self.bench.calibration.tokens / max(rows, 1)
        few = math.ceil(probed_rows(tokens) / recovery.rows)
        works = [self._work(allocation, recovery) for allocation in allocations]
        return refitted_twins(self.bench, works, recovery, self.resolved, most=few)

    def _work(self, allocation: Allocation, recovery: Recovery) -> Work:
        """What is to be refitted, and the layers that the refit does not make."""
        work: Work = []
        for names, group in self.groups.items():
            option = allocation[names]
            if option.dense:
                continue
            entry = Entry.of(group[0], option)
            if refit_makes(recovery, group[0], entry):
                work.append((group[0], entry, None))
                continue
            (new,) = self._factored(names, [option])
            work += [
                (site, Entry.of(site, option), settled(module))
                for site, module in zip(group, new, strict=True)
            ]
        return work

    def _put(self, work: Work) -> nn.Module:
        lean = twin(self.bench.model)
        for site, _, new in work:
            if new is not None:
                lean = put(lean, site, new)
        return lean

    def _judged(self, twins: Sequence[nn.Module]) -> list[float]:
        return list(dealt(partial(self._value, lean) for lean in twins))

    def _value(self, lean: nn.Module) -> float:
        try:
            return self.bench.judge.judged(lean)
        except NotFinite:
            raise
        except LowrankError as error:
            raise LowrankError(f"{error}; policy='uniform' does not compare") from None


def hold_out_of(request: Request, sites: Sequence[Site]) -> float:
    """Share of the calibration rows held out: also where the default policy will judge.

    Args:
        sites: all sites considered; those without a reason are the targets.
    """
    by_default = request.policy is None and request.ratio is not None and mostly_convs(sites)
    return HOLD_OUT if by_default else request.hold_out


def mostly_convs(sites: Sequence[Site]) -> bool:
    """Whether convolutions hold most of the targets' parameters."""
    targets = [site for site in sites if not site.reason]
    convs = sum(site.cost.params for site in targets if site.kind == "conv")
    return 2 * convs > sum(site.cost.params for site in targets)


def _pinned(request: Request, sites: Sequence[Site], curves: Curves) -> Choice:
    """The options that `rank_pattern` fixes.

    Raises:
        LowrankError: a rank is not below break-even, or names with one basis get two ranks.
    """
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
            size = "a size" if own_form(request.method) else f"a rank of {even} or more,"
            raise LowrankError(
                f"rank_pattern {key!r}: keeping {value} of the energy of {site.title} takes {size}"
                " which is not smaller than the dense layer"
            )
        options[site.names] = option
    return options


def _check_one_rank(patterns: Mapping[str, int | float], site: Site) -> None:
    """Check that sites with one basis get one rank; naming one of them is enough.

    Raises:
        LowrankError: `rank_pattern` gives them different ranks.
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
    """Options of a fixed rank for all sites: an integer, or a float, the share of energy kept."""
    if isinstance(rank, float):
        return dict(Energy(share=rank)(curves, Budget(0))) if curves else {}
    options = {}
    for site, curve in zip(sites, curves, strict=True):
        # A rank missing from the curve captures no more than the next one below it.
        option = at_most(curve, rank)
        smaller = option is not None and rank < break_even(site.shape, *request.stored(site))
        options[site.names] = option if option is not None and smaller else curve.dense
    return options


def _budget(request: Request, total: int, rest: int, free: Sequence[Curve]) -> Budget:
    """The budget left for the free sites, after the fixed cost `rest`.

    Raises:
        LowrankError: even the smallest options exceed it; the smallest reachable ratio is named.
    """
    # Exact decimal arithmetic: 0.29 · 100 is 29.
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
        f"{cannot}: with every target at its smallest, {reachable:.4f} of the {request.unit} "
        "are kept; ask for at least that"
    )
