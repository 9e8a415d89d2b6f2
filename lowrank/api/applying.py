"""From a plan to a changed model: build every factored layer, then put all of them in place."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import io, layouts, linalg
from .. import sites as walk
from ..calibrate import Calibration
from ..errors import LowrankError, listed
from ..methods import METHODS, method
from ..plan import Entry, Measured, Plan, Report
from ..timing import paired_ratio
from ..types import Cost, Factored, Method, Site, Statistics
from .planning import Curves, statistics_of, versions

MARGIN = 0.98  # prefer="speed": a factored layer has to need less than this share of dense time


def carry_out(
    model: nn.Module,
    plan: Plan,
    seen: Calibration | None,
    *,
    way: Method | None,
    curves: Curves | None,
    progress: bool,
) -> tuple[nn.Module, Report]:
    """Apply a plan; when anything raises, the model is as it was.

    Args:
        way: a method that no registry knows, for plans made with it.
        curves: those that the plan was made from, where they are on the same statistics.
    """
    started = time.perf_counter()
    work = _matched(model, plan)
    before = _tensors(model)
    built: list[tuple[Site, Entry, nn.Module | None, Measured]] = []
    for site, entry in tqdm(work, "factor", delay=2, disable=not progress, leave=False):
        built.append(_build(site, entry, plan, seen, way, curves))
    root = model
    for site, _, new, _ in built:
        if new is not None:
            root = walk.replace(root, site, new)
    io.attach(root, {"lowrank_version": versions().get("lowrank", ""), "asked": dict(plan.asked)})
    after = _tensors(root)
    report = Report(
        plan=plan,
        sites=tuple(measured for *_, measured in built),
        achieved=_achieved(plan, built),
        achieved_of_model=_achieved_of_model(plan, built),
        params_before=before.params,
        params_after=after.params,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        seconds=time.perf_counter() - started,
        tokens=0 if seen is None else seen.tokens,
        seed=int(plan.settings.get("seed", 0)),
        versions=versions(),
    )
    return root, report


def _matched(model: nn.Module, plan: Plan) -> list[tuple[Site, Entry]]:
    """The sites that the plan factors.

    Raises:
        LowrankError: the plan was made for another model.
    """
    by_name = {name: site for site in walk.find(model) for name in site.names}
    work = []
    for entry in plan.entries:
        if entry.size is None:
            continue
        site = by_name.get(entry.name)
        if site is None:
            raise LowrankError(
                f"the plan names {entry.name!r}, which the model lacks; it has {listed(by_name)}"
            )
        if site.shape != entry.shape or set(site.names) != set(entry.sites):
            raise LowrankError(
                f"{entry.name}: the plan was made for shape {entry.shape} under the names "
                f"{listed(entry.sites)}, the model has {site.shape} under {listed(site.names)}"
            )
        if site.reason:
            raise LowrankError(f"{entry.name} cannot be factored: {site.reason}")
        if not layouts.is_finite(site.module):
            raise LowrankError(f"{entry.name}: the weight holds NaN or Inf")
        work.append((site, entry))
    return work


def _build(
    site: Site,
    entry: Entry,
    plan: Plan,
    seen: Calibration | None,
    way: Method | None,
    curves: Curves | None,
) -> tuple[Site, Entry, nn.Module | None, Measured]:
    started = time.perf_counter()
    stats = statistics_of(site, seen)
    used = _method_for(entry, way, int(plan.settings.get("seed", 0)))
    if used.needs and stats.count == 0:
        raise LowrankError(
            f"{entry.name}: {entry.method} needs {', '.join(sorted(used.needs))}; "
            "pass the data= that reaches it"
        )
    with torch.no_grad():
        new = used.factor(site.module, entry.option(), stats)
    reason = ""
    if plan.settings.get("prefer") == "speed":
        reason = _too_slow(site, new, seen)
    predicted = _predicted(site, entry, used, stats, curves)
    measured = Measured(
        entry.name,
        entry.norm,
        entry.error,
        predicted,
        _measured(site, entry, new, stats) if not reason else 0.0,
        entry.total,
        time.perf_counter() - started,
        reason,
    )
    return site, entry, None if reason else new, measured


def _method_for(entry: Entry, way: Method | None, seed: int) -> Method:
    if entry.method in METHODS:
        known = method(entry.method, seed)
        return way if way is not None and type(way) is type(known) else known
    if way is None:
        raise LowrankError(f"{entry.name}: the plan's method {entry.method!r} is unknown; pass it")
    return way


def _predicted(
    site: Site, entry: Entry, used: Method, stats: Statistics, curves: Curves | None
) -> float | None:
    """The error on the statistics in use; a plan made on others gets a curve of its own here."""
    curve = used.curve(site, stats) if curves is None else curves[site.name]
    return next((o.error for o in curve.options if o.size == entry.size), None)


def _measured(site: Site, entry: Entry, new: nn.Module, stats: Statistics) -> float | None:
    """Error of the stored factors, rounding included, in the norm of the plan."""
    if not isinstance(new, Factored) or entry.norm not in ("weight", "output"):
        return None
    gram = stats.gram if entry.norm == "output" else None
    dense = new.dense_weight(torch.float64)
    return linalg.squared_error(layouts.matrix(site.module), dense, gram)


def _too_slow(site: Site, new: nn.Module, seen: Calibration | None) -> str:
    """prefer="speed": why the dense layer stays, from paired timings on the caller's shape."""
    if seen is None or site.name not in seen.seen.shapes:
        raise LowrankError(f"{site.name}: prefer='speed' needs data= that runs this layer")
    weight = layouts.matrix(site.module)
    example = torch.randn(seen.seen.shapes[site.name]).to(weight)
    ratio = paired_ratio(lambda: new(example), lambda: site.module(example))
    return "" if ratio < MARGIN else f"factored it takes {ratio:.2f} of the dense layer's time"


def _tensors(model: nn.Module) -> Cost:
    unique = {id(parameter): parameter for parameter in model.parameters()}.values()
    params = sum(p.numel() for p in unique)
    return Cost(params, sum(p.numel() * p.dtype.itemsize for p in unique), 0)


def _achieved(plan: Plan, built: Sequence[tuple[Site, Entry, nn.Module | None, Measured]]) -> float:
    """Share of the targets that is stored now, counted on the new modules."""
    now = {e.name: _cost(e, new) for _, e, new, _ in built}
    targets = [entry for entry in plan.entries if entry.target]
    stored = sum(now.get(e.name, e.dense).of(plan.unit) for e in targets)
    return stored / max(sum(e.dense.of(plan.unit) for e in targets), 1)


def _achieved_of_model(
    plan: Plan, built: Sequence[tuple[Site, Entry, nn.Module | None, Measured]]
) -> float:
    saved = sum(e.dense.of(plan.unit) - _cost(e, new).of(plan.unit) for _, e, new, _ in built)
    return 1 - saved / max(plan.model.of(plan.unit), 1)


def _cost(entry: Entry, new: nn.Module | None) -> Cost:
    return new.cost() if isinstance(new, Factored) else entry.dense
