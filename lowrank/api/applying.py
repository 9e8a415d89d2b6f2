"""From a plan to a changed model: every factored layer is built, then all are put in place."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import io, linalg
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError, listed
from ..measure.size import model_cost
from ..plans import shared_basis as groups
from ..plans.entry import Entry
from ..plans.plan import Plan
from ..plans.report import Report
from ..plans.versions import versions
from ..recover.copies import hand_over
from ..recover.recovery import Recovery
from ..recover.run import Recovered, recover
from ..types import Cost, Factored, Method, Site
from ..walk import layouts
from ..walk.sites import find_sites
from ..walk.surgery import factored, put, unchanged_on_error
from .allocating import Curves
from .building import Built, Way, Work, build, error_of, grouped, method_for
from .notes import notes_of


def carry_out(
    model: nn.Module,
    plan: Plan,
    seen: Calibration | None,
    *,
    way: Way,
    curves: Curves | None,
    started: float,
    progress: bool,
) -> tuple[nn.Module, Report]:
    """Apply a plan; when anything raises, the model is as it was.

    Args:
        way: the object that the plan's own method is, where no registry knows it.
        curves: those that the plan was made from, where they are on the same statistics.
        started: when the caller's call began, by time.perf_counter.
    """
    work = matched(model, plan)
    before = model_cost(model, [])
    bar = tqdm(grouped(work), "factor", delay=2, disable=not progress, leave=False)
    built = [item for group in bar for item in build(group, plan, seen, way, curves)]
    came = _recovered(model, plan, built, seen, way, progress)
    if came is not None:
        built = [item._replace(new=came.modules.get(item.site.name)) for item in built]
        built = [_remeasured(item, plan, seen, way) for item in built]
    root = model
    with unchanged_on_error(model):
        for site, _, new, _ in built:
            if new is not None:
                root = put(root, site, new)
        io.attach(root, {"asked": dict(plan.asked)})
        hand_over(() if came is None else came.vectors.values())
    after = model_cost(root, [])
    report = Report(
        plan=plan,
        sites=tuple(item.measured for item in built),
        achieved=_achieved(plan, built),
        achieved_of_model=1 - _saved(plan, built) / max(plan.model.of(plan.unit), 1),
        params_before=before.params,
        params_after=after.params,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        seconds=time.perf_counter() - started,
        tokens=0 if seen is None else seen.tokens,
        seed=plan.seed,
        versions=versions(),
        notes=(*notes_of(built, plan, seen), *(() if came is None else came.notes)),
    )
    return root, report


def _recovered(
    model: nn.Module,
    plan: Plan,
    built: Sequence[Built],
    seen: Calibration | None,
    way: Way,
    progress: bool,
) -> Recovered | None:
    """What the plan's recovery makes of the layers; None where it asks for none."""
    recovery = Recovery.from_json(plan.settings.get("recovery"))
    if recovery is None:
        return None
    together = [item.entry.title for item in built if item.entry.group]
    if together:
        raise LowrankError(
            f"recovery refits layers one by one, and the plan gives {listed(together, 4)} one "
            "basis: take 'recovery' out of its settings"
        )
    work = [(item.site, item.entry, item.new) for item in built if item.new is not None]
    damp = getattr(way, "damp", linalg.DAMP)
    came = recover(
        model, work, seen, recovery, lambda entry: cast(Method, method_for(entry, plan, way)),
        damp=damp, seed=plan.seed, progress=progress,
    )  # fmt: skip
    if came.broken:
        raise LowrankError(
            "the compressed model's predictions on held-out rows hold NaN or Inf, and the dense "
            "model's do not: run it in float32 or bfloat16"
        )
    return came


def _remeasured(item: Built, plan: Plan, seen: Calibration | None, way: Way) -> Built:
    """Recovered layers serve other inputs: their error on the dense stream is no smaller."""
    if item.new is None or item.measured.measured is None:
        return item
    used = method_for(item.entry, plan, way)
    stats = statistics_of(item.site, seen)
    error = error_of(item.site, item.measured.norm, item.new, stats, used)
    return item._replace(measured=replace(item.measured, measured=error))


def matched(model: nn.Module, plan: Plan) -> Work:
    """The sites that the plan factors.

    Raises:
        LowrankError: the plan was made for another model, or a site cannot be factored now.
    """
    groups.checked(plan.entries)
    sites = find_sites(model)
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


def _check_same(entry: Entry, by_name: dict[str, Site], model: nn.Module) -> None:
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


def _achieved(plan: Plan, built: Sequence[Built]) -> float:
    """Share of the targets that is stored now, counted on the new modules."""
    now = {item.entry.name: _stored(item) for item in built}
    targets = [entry for entry in plan.entries if entry.target]
    stored = sum(now.get(entry.name, entry.dense).of(plan.unit) for entry in targets)
    return stored / max(sum(entry.dense.of(plan.unit) for entry in targets), 1)


def _saved(plan: Plan, built: Sequence[Built]) -> int:
    unit = plan.unit
    return sum(item.entry.dense.of(unit) - _stored(item).of(unit) for item in built)


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
