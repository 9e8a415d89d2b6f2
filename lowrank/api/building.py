"""One site, or one group of sites, becomes its factored modules; nothing is put in place yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import nn

from .. import linalg
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError, listed
from ..measure.timing import paired_ratio
from ..methods import JOINT, METHODS, for_kind, joint, method, stored_as
from ..nn import LowRankEmbedding, TiedHead
from ..plans import shared_basis as groups
from ..plans.entry import Entry
from ..plans.plan import Plan
from ..plans.report import Measured
from ..types import Cost, Curve, Factored, JointMethod, Method, Site, Statistics
from ..walk import layouts
from .allocating import Curves

MARGIN = 0.98  # prefer="speed": a factored layer has to need less than this share of dense time
Work = list[tuple[Site, Entry]]
Way = Method | JointMethod | None  # an object given in place of a name


class Built(NamedTuple):
    """A factored layer that is ready to be put in place; `new` None leaves the site dense."""

    site: Site
    entry: Entry
    new: nn.Module | None
    measured: Measured


def grouped(work: Work) -> list[Work]:
    """What is factored together, the owner of what is shared first."""
    there = {entry.name: (site, entry) for site, entry in work}
    shared = groups.grouped([entry for _, entry in work])
    found = {
        entry.group or entry.name: [there[e.name] for e in shared.get(entry.group, [entry])]
        for _, entry in work
    }
    return list(found.values())


def build(
    work: Work, plan: Plan, seen: Calibration | None, way: Way, curves: Curves | None
) -> list[Built]:
    """A site alone, or a group that shares its basis: its errors are those of all together.

    Raises:
        LowrankError: statistics or the method are not at hand, or it gave no modules.
    """
    started = time.perf_counter()
    sites, entry = [site for site, _ in work], work[0][1]
    stats = _statistics(sites, entry, seen)
    used = method_for(entry, plan, way)
    if not entry.group:
        used = stored_as(cast(Method, used), entry.storage)
    if used.needs and stats.count == 0:
        raise LowrankError(
            f"{entry.title}: {entry.method} works from calibration data "
            f"({', '.join(sorted(used.needs))}): pass data=… that reaches this layer"
        )
    modules = _factored(work, used, stats)
    # A plan made on other statistics, or edited, gets a curve of its own here, in its storage.
    curve = _curve(sites, used, stats) if curves is None else curves[sites[0].name]
    fast = plan.settings.get("prefer") == "speed"
    reason = _too_slow(sites, modules, seen, plan.seed) if fast else ""
    errors = [
        error_of(site, curve.norm, new, stats, used)
        for site, new in zip(sites, modules, strict=True)
    ]
    measured = None if None in errors else sum(filter(None, errors))
    found = Measured(
        name=entry.name,
        norm=curve.norm,
        planned=entry.error if entry.norm == curve.norm else None,
        predicted=_predicted(entry, curve),
        measured=0.0 if reason else measured,
        total=curve.total,
        seconds=(time.perf_counter() - started) / len(work),
        reason=reason,
    )
    return [
        Built(site, entry, None if reason else new, replace(found, name=entry.name))
        for (site, entry), new in zip(work, modules, strict=True)
    ]


def _statistics(sites: Sequence[Site], entry: Entry, seen: Calibration | None) -> Statistics:
    """Of the one input that all these sites read.

    Raises:
        LowrankError: with this data they read several tensors.
    """
    every = [statistics_of(site, seen) for site in sites]
    parted = [s.title for s, stats in zip(sites, every, strict=True) if not _same(stats, every[0])]
    if parted:
        raise LowrankError(
            f"the plan gives {listed(site.title for site in sites)} one input basis, but with this "
            f"data {listed(parted)} did not read the same tensor as {entry.title}: make a new plan"
        )
    return every[0]


def _same(stats: Statistics, first: Statistics) -> bool:
    return stats.count == first.count and stats.gram is first.gram


def _factored(work: Work, used: Method | JointMethod, stats: Statistics) -> list[nn.Module]:
    """The new modules, of the kind and the number that they have to be."""
    dense, entry = [site.module for site, _ in work], work[0][1]
    option = replace(entry.option(), cost=sum((e.cost for _, e in work), Cost(0, 0, 0)))
    with torch.no_grad():
        if entry.group:
            made = list(cast(JointMethod, used).factor(dense, option, stats))
        else:
            made = [cast(Method, used).factor(dense[0], option, stats)]
    wanted: type[nn.Module] = (
        LowRankEmbedding if layouts.head_count(work[0][0].modules) else nn.Module
    )
    wrong = [type(new).__name__ for new in made if not isinstance(new, wanted)]
    if wrong or len(made) != len(work):
        said = f"must give an nn.Module ({wanted.__name__}), got {listed(wrong)}"
        if not wrong:
            said = f"must give {len(work)} modules, got {len(made)}"
        raise LowrankError(f"{entry.title}: {entry.method} {said}")
    return made


def _curve(sites: Sequence[Site], used: Method | JointMethod, stats: Statistics) -> Curve:
    if joint(used) is not None:
        return cast(JointMethod, used).curve(sites, stats)
    return cast(Method, used).curve(sites[0], stats)


def method_for(entry: Entry, plan: Plan, way: Way) -> Method | JointMethod:
    """What factors an entry's site: `way` where it is the plan's own method and of the sort that
    the entry calls for, or the registry's."""
    shared = joint(way)
    if way is not None and entry.method == plan.method and bool(entry.group) == bool(shared):
        return shared or for_kind(cast(Method, way), entry.kind)
    if not entry.group and entry.method in METHODS:
        return for_kind(method(entry.method, plan.seed), entry.kind)
    if entry.group and entry.method in JOINT:
        return cast(JointMethod, joint(entry.method, plan.seed))
    known = listed(JOINT if entry.group else METHODS)
    raise LowrankError(
        f"{entry.title}: the plan's method {entry.method!r} is none of {known}: "
        "pass the object as method=…"
    )


def _predicted(entry: Entry, curve: Curve) -> float | None:
    same = (o for o in curve.options if (o.size, o.storage) == (entry.size, entry.storage))
    return next((o.error for o in same), None)


def error_of(
    site: Site, norm: str, new: nn.Module, stats: Statistics, used: Method | JointMethod
) -> float | None:
    """Error of the stored factors, rounding included, in the norm of the curve.

    A method with a norm of its own has the verb `error(module, weight, stats)`.
    """
    own = getattr(used, "error", None)
    if isinstance(new, Factored) and callable(own):
        found = own(site.module, new.dense_weight(torch.float64), stats)
        if found is not None:
            return float(found)
    gram = stats.gram if norm == "output" else None
    known = norm == "weight" or gram is not None or stats.freq is not None
    if not isinstance(new, Factored) or not known:
        return None
    dense = new.dense_weight(torch.float64)
    if norm == "output" and site.kind == "embedding" and stats.freq is not None:
        difference = layouts.matrix(site.module).detach().double() - dense.detach()
        metric = linalg.output_metric(stats.gram, site.shape[1])
        return linalg.token_error(difference, linalg.token_weights(stats.freq), metric)
    return linalg.squared_error(layouts.matrix(site.module), dense, gram)


def _too_slow(
    sites: Sequence[Site], modules: Sequence[nn.Module], seen: Calibration | None, seed: int
) -> str:
    """prefer="speed": why dense layers stay, from paired timings on the caller's shape."""
    dense, new = [site.module for site in sites], list(modules)
    if isinstance(new[0], LowRankEmbedding):  # its lookups are slower; a head may make up for it
        heads = [m for m in sites[0].modules if layouts.kind(m) != "embedding"]
        if not heads:
            return "a factored lookup takes a product more than the dense one"
        dense, new = heads[:1], [TiedHead.of(new[0])]
    shapes = {} if seen is None else seen.seen.shapes
    shape = next((shapes[name] for name in sites[0].names if name in shapes), None)
    if shape is None:
        return "the data does not run it, so that it cannot be timed"
    generator = torch.Generator().manual_seed(seed)
    example = torch.randn(shape, generator=generator).to(layouts.matrix(sites[0].module))
    ratio = paired_ratio(lambda: [m(example) for m in new], lambda: [m(example) for m in dense])
    return "" if ratio < MARGIN else f"factored it takes {ratio:.2f} of the dense layer's time"
