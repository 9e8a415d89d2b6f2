"""Apply a plan: build all factored layers, recover, then replace the dense ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import io
from ..calibration.processes import agreed, dealt
from ..calibration.statistics import Calibration, doubts, statistics_of
from ..errors import LowrankError, listed
from ..linalg.mapped import give_back, settled
from ..measure.size import model_cost
from ..measure.timing import paired_ratio
from ..methods.resolved import Resolved
from ..nn import LowRankEmbedding, TiedHead
from ..nn.form import notes_of
from ..nn.table_form import TableForm
from ..plans.entry import Entry
from ..plans.plan import Plan, Work, matched, versions
from ..plans.progress import steps
from ..plans.report import Measured, Report
from ..plans.stages import recorded, stage
from ..recover.copies import hand_over
from ..recover.job import Recovered
from ..recover.recovery import Recovery
from ..recover.run import recover_layers
from ..recover.workbench import Workbench
from ..types import Cost, Curve, Factored, Nested, Option, Site, Statistics
from ..walk import layouts
from ..walk.surgery import put, unchanged_on_error
from .allocating import Curves

MARGIN = 0.98  # prefer="speed": a factored layer must take less than this share of dense time


class Made(NamedTuple):
    """A factored layer, as it is sent to other processes; `new` None leaves its site dense."""

    new: nn.Module | None
    measured: Measured
    curve: Curve


class Built(NamedTuple):
    """A factored layer, ready to replace its site; `new` None leaves the site dense."""

    site: Site
    entry: Entry
    new: nn.Module | None
    measured: Measured
    curve: Curve


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
    """Apply a plan; the model is unchanged on an error.

    Args:
        sites: all sites of the dense model, which is this one or the original of this copy.
        bench: workbench of that dense model, for the plan's recovery.
        curves: those that the plan was made from, if on the same statistics.
        started: start of the call, by time.perf_counter.
    """
    work = matched(sites, plan, model)
    before = model_cost(model, [])
    groups = together(work)
    recovers = plan.settings.get("recovery") is not None
    made = dealt(
        partial(factor_group, group, plan, calibration, resolved, curves, measure=not recovers)
        for group in groups
    )
    with stage("factoring"):
        built = []
        for group, layers in zip(steps(groups, "layer", progress), made, strict=True):
            for (site, entry), (new, measured, curve) in zip(group, layers, strict=True):
                stored = None if new is None else settled(new)
                built.append(Built(site, entry, stored, measured, curve))
    spent = time.perf_counter() - started
    recovered = _recovered(plan, built, resolved, bench, spent, progress)
    if recovered is not None:
        built = [item._replace(new=recovered.modules.get(item.site.name)) for item in built]
        with stage("measuring errors"):
            built = [_remeasured(item, resolved, calibration) for item in built]
    root = model
    with unchanged_on_error(model):
        for item in built:
            if item.new is not None:
                root = put(root, item.site, item.new)
        io.attach(root, _provenance(plan, built, resolved))
        if recovered is not None and recovered.vectors and bench is not None:
            hand_over(recovered.vectors, bench.model, root)
    notes = _notes(built, plan, calibration, bench)
    if recovered is not None:
        notes += recovered.notes
    report = _report(plan, built, before, root, calibration, notes, started)
    gains = () if recovered is None else recovered.gains
    report = agreed(replace(report, gains=gains))
    io.attach(root, report=report)
    return root, report


def together(work: Work) -> list[Work]:
    """The work grouped by shared basis, the owner first."""
    groups: dict[str, Work] = {}
    for site, entry in work:
        groups.setdefault(entry.group or entry.name, []).append((site, entry))
    return [
        sorted(group, key=lambda each: each[1].name != owner) for owner, group in groups.items()
    ]


def factor_group(
    work: Work,
    plan: Plan,
    calibration: Calibration | None,
    resolved: Resolved,
    curves: Curves | None,
    *,
    measure: bool,
) -> list[Made]:
    """Factor one site, or a group with a shared basis, whose errors are summed.

    Args:
        curves: those of the plan, if on the same statistics.
        measure: whether to measure the error now, not after recovery.

    Raises:
        LowrankError: statistics or the method are missing, or it returned no modules.
    """
    started = time.perf_counter()
    sites, entry = [site for site, _ in work], work[0][1]
    stats = _statistics(sites, calibration)
    option = replace(entry.option(), cost=sum((e.cost for _, e in work), Cost(0, 0, 0)))
    modules = resolved.factor(sites, option, stats)
    _check_table(sites[0], entry, modules[0])
    # A plan made on other statistics, or edited, has no curve yet.
    curve = (curves or {}).get(sites[0].name)
    if curve is None:
        curve = _own_curve(sites, entry, calibration, resolved)
    fast = plan.settings.get("prefer") == "speed"
    reason = _too_slow(sites, modules, calibration, plan.seed) if fast else ""
    errors = [
        resolved.error(site, curve, new, stats) if measure else None
        for site, new in zip(sites, modules, strict=True)
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
        Made(None if reason else new, replace(measured, name=entry.name), curve)
        for (_, entry), new in zip(work, modules, strict=True)
    ]


def _report(
    plan: Plan,
    built: Sequence[Built],
    before: Cost,
    root: nn.Module,
    calibration: Calibration | None,
    notes: Sequence[str],
    started: float,
) -> Report:
    after = model_cost(root, [])
    costs = {item.entry.name: _stored(item) for item in built}
    unit = plan.unit
    targets = [entry for entry in plan.entries if entry.target]
    stored = sum(costs.get(entry.name, entry.dense).of(unit) for entry in targets)
    saved = sum(item.entry.dense.of(unit) - costs[item.entry.name].of(unit) for item in built)
    stages, seconds = recorded() or ((), time.perf_counter() - started)
    return Report(
        plan=plan,
        sites=tuple(item.measured for item in built),
        achieved=stored / max(sum(entry.dense.of(unit) for entry in targets), 1),
        achieved_of_model=1 - saved / max(plan.model.of(unit), 1),
        params_before=before.params,
        params_after=after.params,
        bytes_before=before.bytes,
        bytes_after=after.bytes,
        seconds=seconds,
        tokens=0 if calibration is None else calibration.tokens,
        seed=plan.seed,
        versions=versions(),
        notes=tuple(notes),
        stages=stages,
    )


def _notes(
    built: Sequence[Built],
    plan: Plan,
    calibration: Calibration | None,
    bench: Workbench | None,
) -> list[str]:
    """The notes of the report, one sentence each."""
    slow = sum(item.new is None for item in built)
    source = "" if calibration is None else calibration.source
    forms = plan.settings.get("forms") or {}
    judged = ", ".join(f"{form} {kl:.4g}" for form, kl in sorted(forms.items(), key=itemgetter(1)))
    on_seen = bench is not None and bench.judged_on_seen and bench.judge.asked > 0
    measure = bench.judge.measure if forms and bench is not None else "KL"
    candidates = (
        (source, f"calibrated on {source}"),
        (slow, f"left dense because factors are not faster: {slow}; more is kept than planned"),
        (forms, f"{measure} of the forms: {judged}"),
        (on_seen, "no rows were held out: choices were judged on rows that layers were fitted to"),
    )
    notes = [*plan.notes, *(note for holds, note in candidates if holds)]
    notes += notes_of(item.new for item in built)
    if calibration is None:
        return notes
    return notes + doubts([item.site for item in built if item.new is not None], calibration)


def _recovered(
    plan: Plan,
    built: Sequence[Built],
    resolved: Resolved,
    bench: Workbench | None,
    spent: float,
    progress: bool,
) -> Recovered | None:
    """Run the plan's recovery on the layers; None if it has none.

    Args:
        spent: seconds that the call has taken up to now.
    """
    recovery = Recovery.from_json(plan.settings.get("recovery"))
    if recovery is None:
        return None
    shared = [item.entry.title for item in built if item.entry.group]
    if shared:
        raise LowrankError(
            f"recovery refits layers one by one, but the plan gives {listed(shared, 4)} one "
            "basis: remove 'recovery' from its settings"
        )
    work = [(item.site, item.entry, item.new) for item in built if item.new is not None]
    if bench is None:
        raise LowrankError("recovery runs the model on batches: pass them as data=…")
    recovered = recover_layers(
        bench, work, recovery, resolved, seed=plan.seed, spent=spent, left=_left_dense(plan, built),
        progress=progress,
    )  # fmt: skip
    if recovered.broken:
        raise LowrankError(
            "the compressed model's predictions on held-out rows hold NaN or Inf, but the dense "
            "model's do not: run it in float32 or bfloat16"
        )
    return recovered


def _left_dense(plan: Plan, built: Sequence[Built]) -> int:
    """Numbers of the targets that stay dense: a ratio counts them too."""
    made = {item.entry.name for item in built if item.new is not None}
    return sum(e.dense.params for e in plan.entries if e.target and e.name not in made)


def _provenance(plan: Plan, built: Sequence[Built], resolved: Resolved) -> dict[str, Any]:
    """What a config says of the compression; `at_rank` counts by it."""
    return {
        "asked": dict(plan.asked),
        "dense_targets": _left_dense(plan, built),
        "ordered": _ordered(plan, built, resolved),
    }


def _ordered(plan: Plan, built: Sequence[Built], resolved: Resolved) -> bool:
    """Whether the components of plain factors are in order of importance."""
    recovery = Recovery.from_json(plan.settings.get("recovery"))
    if recovery is not None and (recovery.block_steps or recovery.distill_steps):
        return recovery.nested is not None
    if recovery is not None and recovery.refit:
        return True
    makers = (
        resolved.maker(item.entry.method, item.site, grouped=False)
        for item in built
        if item.site.kind == "linear" and item.entry.storage == "factors"
    )
    return all(isinstance(method, Nested) and method.nested for method in makers)


def _remeasured(item: Built, resolved: Resolved, calibration: Calibration | None) -> Built:
    """Measure the error again after recovery, on the dense inputs: it may have grown there."""
    if item.new is None:
        return item
    stats = statistics_of(item.site, calibration)
    error = resolved.error(item.site, item.curve, item.new, stats)
    give_back()
    return item._replace(measured=replace(item.measured, measured=error))


def _stored(item: Built) -> Cost:
    """Cost of a site from its stored tensors, without biases; foreign modules' MACs as planned."""
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


def _statistics(sites: Sequence[Site], calibration: Calibration | None) -> Statistics:
    """Statistics of the one input that all these sites read.

    Raises:
        LowrankError: with this data they read different tensors.
    """
    first, *others = (statistics_of(site, calibration) for site in sites)
    differing = [
        site.title
        for site, stats in zip(sites[1:], others, strict=True)
        if stats.count != first.count or stats.gram is not first.gram
    ]
    if differing:
        raise LowrankError(
            f"the plan gives {listed(site.title for site in sites)} one input basis, but with this "
            f"data {listed(differing)} did not read the same tensor as {sites[0].title}: make a "
            "new plan"
        )
    return first


def _own_curve(
    sites: Sequence[Site], entry: Entry, calibration: Calibration | None, resolved: Resolved
) -> Curve:
    """Curve of an entry whose plan was made elsewhere, by the method that the entry names."""
    if len(sites) > 1:
        return resolved.curve(sites, calibration)
    method: Any = resolved.maker(entry.method, sites[0], grouped=False)
    alone = replace(resolved, method=method, joint=None, storage=entry.storage)
    return alone.curve(sites, calibration)


def _check_table(site: Site, entry: Entry, new: nn.Module) -> None:
    """Raises LowrankError if an output head tied to an embedding could not read the new one."""
    if layouts.head_count(site.modules) and not isinstance(new, LowRankEmbedding):
        raise LowrankError(
            f"{entry.title}: {entry.method} must return a LowRankEmbedding, which the output head "
            f"shares, got {type(new).__name__}"
        )


def _predicted(option: Option, curve: Curve) -> float | None:
    same = (o for o in curve.options if (o.size, o.storage) == (option.size, option.storage))
    return next((o.error for o in same), None)


def _too_slow(
    sites: Sequence[Site], modules: Sequence[nn.Module], calibration: Calibration | None, seed: int
) -> str:
    """With prefer="speed": why layers stay dense, by paired timing at the data's shape; or ""."""
    dense, new = [site.module for site in sites], list(modules)
    if isinstance(new[0], TableForm):  # its lookup is slower; a faster head may compensate
        heads = [m for m in sites[0].modules if layouts.kind(m) != "embedding"]
        if not (heads and isinstance(new[0], LowRankEmbedding)):
            return "a factored lookup takes a product, a dense one takes none"
        dense, new = heads[:1], [TiedHead.of(new[0])]
    shapes = {} if calibration is None else calibration.observation.shapes
    shape = next((shapes[name] for name in sites[0].names if name in shapes), None)
    if shape is None:
        return "the data does not reach it, so it cannot be timed"
    generator = torch.Generator().manual_seed(seed)
    example = torch.randn(shape, generator=generator).to(layouts.matrix(sites[0].module))
    ratio = paired_ratio(lambda: [m(example) for m in new], lambda: [m(example) for m in dense])
    return "" if ratio < MARGIN else f"factored it takes {ratio:.2f} of the dense layer's time"
