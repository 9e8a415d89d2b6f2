"""One site, or one group of sites, becomes its factored modules; nothing is put in place yet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError, listed
from ..measure.timing import paired_ratio
from ..methods.resolved import Resolved
from ..nn import LowRankEmbedding, TiedHead
from ..plans.entry import Entry
from ..plans.plan import Plan
from ..plans.report import Measured
from ..types import Cost, Curve, Option, Site, Statistics
from ..walk import layouts
from .allocating import Curves

MARGIN = 0.98  # prefer="speed": a factored layer has to need less than this share of dense time
Work = list[tuple[Site, Entry]]


class Built(NamedTuple):
    """A factored layer that is ready to be put in place; `new` None leaves the site dense."""

    site: Site
    entry: Entry
    new: nn.Module | None
    measured: Measured
    curve: Curve


def together(work: Work) -> list[Work]:
    """What is factored together, the owner of what is shared first."""
    groups: dict[str, Work] = {}
    for site, entry in work:
        groups.setdefault(entry.group or entry.name, []).append((site, entry))
    return [
        sorted(group, key=lambda each: each[1].name != owner) for owner, group in groups.items()
    ]


def build(
    work: Work,
    plan: Plan,
    calibration: Calibration | None,
    resolved: Resolved,
    curves: Curves | None,
) -> list[Built]:
    """A site alone, or a group that shares its basis: its errors are those of all together.

    Args:
        curves: of the plan, where they are on the same statistics.

    Raises:
        LowrankError: statistics or the method are not at hand, or it gave no modules.
    """
    started = time.perf_counter()
    sites, entry = [site for site, _ in work], work[0][1]
    stats = _statistics(sites, calibration)
    option = replace(entry.option(), cost=sum((e.cost for _, e in work), Cost(0, 0, 0)))
    modules = resolved.factor(sites, option, stats)
    _check_table(sites[0], entry, modules[0])
    # A plan made on other statistics, or edited, gets a curve of its own here, in its storage.
    curve = _curve(sites, entry, calibration, resolved) if curves is None else curves[sites[0].name]
    fast = plan.settings.get("prefer") == "speed"
    reason = _too_slow(sites, modules, calibration, plan.seed) if fast else ""
    errors = [
        resolved.error(site, curve, new, stats) for site, new in zip(sites, modules, strict=True)
    ]
    known = [error for error in errors if error is not None]
    measured = Measured(
        name=entry.name,
        norm=curve.norm,
        planned=entry.error if entry.norm == curve.norm else None,
        predicted=_predicted(option, curve),
        measured=0.0 if reason else sum(known) if len(known) == len(errors) else None,
        total=curve.total,
        seconds=(time.perf_counter() - started) / len(work),
        reason=reason,
    )
    return [
        Built(site, entry, None if reason else new, replace(measured, name=entry.name), curve)
        for (site, entry), new in zip(work, modules, strict=True)
    ]


def _statistics(sites: Sequence[Site], calibration: Calibration | None) -> Statistics:
    """Of the one input that all these sites read.

    Raises:
        LowrankError: with this data they read several tensors.
    """
    first, *others = (statistics_of(site, calibration) for site in sites)
    parted = [
        site.title
        for site, stats in zip(sites[1:], others, strict=True)
        if stats.count != first.count or stats.gram is not first.gram
    ]
    if parted:
        raise LowrankError(
            f"the plan gives {listed(site.title for site in sites)} one input basis, but with this "
            f"data {listed(parted)} did not read the same tensor as {sites[0].title}: make a new "
            "plan"
        )
    return first


def _curve(
    sites: Sequence[Site], entry: Entry, calibration: Calibration | None, resolved: Resolved
) -> Curve:
    """Of an entry whose plan was made elsewhere: by the method that the entry names."""
    if len(sites) > 1:
        return resolved.curve(sites, calibration)
    method: Any = resolved.maker(entry.method, sites[0], grouped=False)
    alone = replace(resolved, method=method, joint=None, storage=entry.storage)
    return alone.curve(sites, calibration)


def _check_table(site: Site, entry: Entry, new: nn.Module) -> None:
    """Raises LowrankError where the readers of a tied table could not read the new one."""
    if layouts.head_count(site.modules) and not isinstance(new, LowRankEmbedding):
        raise LowrankError(
            f"{entry.title}: {entry.method} must give a LowRankEmbedding, which the output head "
            f"reads too, got {type(new).__name__}"
        )


def _predicted(option: Option, curve: Curve) -> float | None:
    same = (o for o in curve.options if (o.size, o.storage) == (option.size, option.storage))
    return next((o.error for o in same), None)


def _too_slow(
    sites: Sequence[Site], modules: Sequence[nn.Module], calibration: Calibration | None, seed: int
) -> str:
    """prefer="speed": why dense layers stay, from paired timings on the caller's shape."""
    dense, new = [site.module for site in sites], list(modules)
    if isinstance(new[0], LowRankEmbedding):  # its lookups are slower; a head may make up for it
        heads = [m for m in sites[0].modules if layouts.kind(m) != "embedding"]
        if not heads:
            return "a factored lookup takes a product more than the dense one"
        dense, new = heads[:1], [TiedHead.of(new[0])]
    shapes = {} if calibration is None else calibration.observation.shapes
    shape = next((shapes[name] for name in sites[0].names if name in shapes), None)
    if shape is None:
        return "the data does not run it, so that it cannot be timed"
    generator = torch.Generator().manual_seed(seed)
    example = torch.randn(shape, generator=generator).to(layouts.matrix(sites[0].module))
    ratio = paired_ratio(lambda: [m(example) for m in new], lambda: [m(example) for m in dense])
    return "" if ratio < MARGIN else f"factored it takes {ratio:.2f} of the dense layer's time"
