"""From a plan to a changed model: every factored layer is built, then all are put in place."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import io
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError, listed
from ..measure.size import model_cost
from ..methods.resolved import Resolved
from ..plans import shared_basis
from ..plans.entry import Entry
from ..plans.plan import Plan
from ..plans.report import Report
from ..plans.versions import versions
from ..recover.chain import Workbench
from ..recover.copies import hand_over
from ..recover.recovery import Recovery
from ..recover.run import Recovered, recover_layers
from ..types import Cost, Factored, Site
from ..walk import layouts
from ..walk.surgery import factored, put, unchanged_on_error
from .allocating import Curves
from .building import Built, Work, build, together
from .notes import notes_of


def carry_out(
    model: nn.Module,
    plan: Plan,
    sites: Sequence[Site],
    resolved: Resolved,
    calibration: Calibration | None,
    *,
    bench: Workbench | None,
    curves: Curves | None,
    started: float,
    progress: bool,
) -> tuple[nn.Module, Report]:
    """Apply a plan; when anything raises, the model is as it was.

    Args:
        sites: all of the dense model: this one, or one that it is a copy or a twin of.
        bench: of that dense model, for the plan's recovery.
        curves: those that the plan was made from, where they are on the same statistics.
        started: when the caller's call began, by time.perf_counter.
    """
    work = matched(sites, plan, model)
    before = model_cost(model, [])
    bar = tqdm(together(work), "factor", delay=2, disable=not progress, leave=False)
    built = [item for group in bar for item in build(group, plan, calibration, resolved, curves)]
    recovered = _recovered(plan, built, resolved, bench, progress)
    if recovered is not None:
        built = [item._replace(new=recovered.modules.get(item.site.name)) for item in built]
        built = [_remeasured(item, resolved, calibration) for item in built]
    root = model
    with unchanged_on_error(model):
        for item in built:
            if item.new is not None:
                root = put(root, item.site, item.new)
        io.attach(root, {"asked": dict(plan.asked)})
        if recovered is not None and recovered.vectors and bench is not None:
            hand_over(recovered.vectors, bench.model, root)
    notes = notes_of(built, plan, calibration, bench)
    if recovered is not None:
        notes = (*notes, *recovered.notes)
    return root, _report(plan, built, before, root, calibration, notes, started)


def _report(
    plan: Plan,
    built: Sequence[Built],
    before: Cost,
    root: nn.Module,
    calibration: Calibration | None,
    notes: tuple[str, ...],
    started: float,
) -> Report:
    after = model_cost(root, [])
    now = {item.entry.name: _stored(item) for item in built}
    unit = plan.unit
    targets = [entry for entry in plan.entries if entry.target]
    stored = sum(now.get(entry.name, entry.dense).of(unit) for entry in targets)
    saved = sum(item.entry.dense.of(unit) - now[item.entry.name].of(unit) for item in built)
    return Report(
        plan=plan,
        sites=tuple(item.measured for item in built),
        achieved=stored / max(sum(entry.dense.of(unit) for entry in targets), 1),
        achieved_of_model=1 - saved / max(plan.model.of(unit), 1),
        params_before=before.params,
        params_after=after.params,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        seconds=time.perf_counter() - started,
        tokens=0 if calibration is None else calibration.tokens,
        seed=plan.seed,
        versions=versions(),
        notes=notes,
    )


def _recovered(
    plan: Plan,
    built: Sequence[Built],
    resolved: Resolved,
    bench: Workbench | None,
    progress: bool,
) -> Recovered | None:
    """What the plan's recovery makes of the layers; None where it asks for none."""
    recovery = Recovery.from_json(plan.settings.get("recovery"))
    if recovery is None:
        return None
    shared = [item.entry.title for item in built if item.entry.group]
    if shared:
        raise LowrankError(
            f"recovery refits layers one by one, and the plan gives {listed(shared, 4)} one "
            "basis: take 'recovery' out of its settings"
        )
    work = [(item.site, item.entry, item.new) for item in built if item.new is not None]
    if bench is None:
        raise LowrankError("recovery runs the model on batches: pass data=… that holds them")
    recovered = recover_layers(bench, work, recovery, resolved, seed=plan.seed, progress=progress)
    if recovered.broken:
        raise LowrankError(
            "the compressed model's predictions on held-out rows hold NaN or Inf, and the dense "
            "model's do not: run it in float32 or bfloat16"
        )
    return recovered


def _remeasured(item: Built, resolved: Resolved, calibration: Calibration | None) -> Built:
    """Recovered layers serve other inputs: their error on the dense stream is no smaller."""
    if item.new is None or item.measured.measured is None:
        return item
    stats = statistics_of(item.site, calibration)
    error = resolved.error(item.site, item.curve, item.new, stats)
    return item._replace(measured=replace(item.measured, measured=error))


def matched(sites: Sequence[Site], plan: Plan, model: nn.Module) -> Work:
    """The sites that the plan factors.

    Raises:
        LowrankError: the plan was made for another model, or a site cannot be factored now.
    """
    if any(entry.group for entry in plan.entries):
        shared_basis.consistent(plan.entries)
    by_name = {name: site for site in sites for name in site.names}
    for entry in plan.entries:
        _check_same(entry, by_name, model)
    unknown = sorted(by_name.keys() - {name for entry in plan.entries for name in entry.sites})
    if unknown:
        raise LowrankError(
            f"the plan says nothing of {listed(unknown, 4)}: it was made for another model, or "
            "entries were taken out (an entry of size null leaves a layer dense)"
        )
    work = [(by_name[entry.name], entry) for entry in plan.entries if entry.size is not None]
    for site, _ in work:
        if site.reason:
            raise LowrankError(f"{site.title} cannot be factored: {site.reason}")
        if not layouts.is_finite(site.module):
            raise LowrankError(f"{site.title}: the weight holds NaN or Inf")
    return work


def _check_same(entry: Entry, by_name: Mapping[str, Site], model: nn.Module) -> None:
    """Raises LowrankError unless the model has the layer that the entry was made for."""
    site = by_name.get(entry.name)
    if site is None and entry.name in factored(model):
        raise LowrankError(f"{entry.title} is factored already: apply the plan to the dense model")
    if site is None:
        raise LowrankError(
            f"the plan was made for another model: it names {entry.title}, the model has "
            f"{listed(by_name, 4) or 'no linear layer'}"
        )
    if site.shape != entry.shape or set(site.names) != set(entry.sites):
        raise LowrankError(
            f"{entry.title}: the plan was made for another model: shape {entry.shape} under the "
            f"names {_titles(entry.sites)}; here it is {site.shape} under {_titles(site.names)}"
        )


def _titles(names: Sequence[str]) -> str:
    return listed(name or "(root)" for name in names)


def _stored(item: Built) -> Cost:
    """What a site costs now: its tensors, biases excluded; macs of modules not ours as planned."""
    if item.new is None:
        return item.entry.dense
    if isinstance(item.new, Factored):
        cost = item.new.cost()
        heads = item.entry.heads * cost.params
        return Cost(cost.params, cost.bytes, cost.macs + heads).often(item.entry.repeats)
    held = {id(t): (name, t) for name, t in item.new.state_dict(keep_vars=True).items()}.values()
    tensors = [t for name, t in held if isinstance(t, torch.Tensor) and not name.endswith("bias")]
    params = sum(t.numel() for t in tensors if t.is_floating_point())
    stored = sum(t.numel() * t.dtype.itemsize for t in tensors)
    return Cost(params, stored, item.entry.cost.macs)
