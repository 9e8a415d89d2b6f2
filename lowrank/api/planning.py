"""Make a plan: decompose the targets into curves, then allocate. The model is not changed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from ..calibration.digests import add_tensor
from ..calibration.processes import agreed, dealt
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError, listed
from ..linalg.mapped import give_back
from ..measure.size import model_cost
from ..methods.common import stacked
from ..methods.resolved import Resolved, own_form
from ..plans import shared_basis
from ..plans.entry import Entry
from ..plans.plan import Plan, versions
from ..plans.progress import steps
from ..plans.stages import stage
from ..policies.common import measured
from ..recover.workbench import Workbench
from ..types import Allocation, Cost, Curve, Measured, Probe, SeveralForms, Site
from ..walk import layouts
from ..walk.coverage import held_elsewhere, uncovered, unsound
from ..walk.sites import pattern_value
from .allocating import Curves, Judge, allocate, mostly_convs, why_dense
from .grouping import Group, groups_of
from .positions import counted, often, repeat_counts
from .request import Request

HELD = (
    "cannot be replaced (the model asks for their class, or calls them through a list or closure "
    "that keeps the dense layer)"
)
ZEROS = "read nothing but zeros in the data"


@dataclass(frozen=True)
class Decomposed:
    """Sites and the curves of their options.

    Attributes:
        sites: all sites considered; those without a reason are the targets.
        groups: the targets, grouped by shared basis, the owner first.
        curves: by the name of a group's first site.
        forms: for a method with several forms, the curves of each form alone.
        times: for a MACs budget, output positions by layer name, relative to the least-used layer.
    """

    sites: Sequence[Site]
    groups: Sequence[Group]
    curves: Curves
    forms: Mapping[str, Curves] = field(default_factory=dict)
    times: Mapping[str, int] = field(default_factory=dict)

    def stacks(self) -> list[Site]:
        """One stacked site per group."""
        return [group[0] if len(group) == 1 else stacked(group) for group in self.groups]


def make_plan(
    model: nn.Module,
    request: Request,
    sites: Sequence[Site],
    calibration: Calibration | None,
    bench: Workbench | None,
    *,
    remember: bool = False,
    known: Mapping[str, Curve] | None = None,
) -> tuple[Plan, Curves, Resolved]:
    """Returns the plan, its curves by the name of each group's first site, and the resolved method.

    Args:
        sites: all sites considered; those without a reason are the targets.
        bench: workbench to judge candidates on; None if nothing can be judged.
        remember: cache the curves in the calibration, for the next plan.
        known: curves of some sites alone, by name, of this method and this calibration.
    """
    resolved = request.resolved(data=calibration is not None)
    _check_data(request, resolved, calibration)
    held = held_elsewhere(model) if calibration is None else _held(sites, calibration)
    taken, notes = _workable(sites, resolved, calibration, request, held)
    with stage("decompositions"):
        parts = _decomposed(taken, resolved, calibration, request, remember, known or {})
    is_layer = any(site.name == "" for site in parts.sites)  # no model around it to judge
    bench = None if is_layer else bench
    if request.policy is None and request.ratio is not None:
        request = replace(request, policy=_default_policy(parts, bench, resolved))
    resolved = resolved.knowing(
        parts.curves[group[0].name]
        for group in parts.groups
        if len(group) > 1 or resolved.is_seen(group[0], calibration)  # others are data-free
    )
    if request.unit == "macs":
        parts = _with_repeats(parts, sites, calibration)
    whole = model_cost(model, parts.sites)
    # What cannot be factored is no target: the others would pay for it.
    targets = [site for site in parts.sites if not site.reason]
    goal = sum(site.cost.of(request.unit) for site in targets)
    groups = {s.names: g for s, g in zip(parts.stacks(), parts.groups, strict=True)}
    probe = None if bench is None else Judge(bench, groups, resolved, request.recovery)
    with stage("choosing ranks"):
        chosen, curves, compared = _chosen(request, goal, parts, whole, probe)
    entries = _entries(parts, chosen, curves, request, {site.names for site in targets})
    settings = _settings(request, resolved, calibration)
    outside = uncovered(model, sites)
    if outside:
        settings["uncovered"] = outside
    if compared:
        settings["forms"] = compared
    notes += unsound(model, targets)
    if notes:
        settings["notes"] = notes
    return agreed(Plan(entries, whole, request.asked(), settings)), curves, resolved


def _check_data(request: Request, resolved: Resolved, calibration: Calibration | None) -> None:
    """Raises LowrankError if the request needs data and there is none."""
    if calibration is not None:
        return
    if resolved.needs:
        method = request.method
        name = method if isinstance(method, str) else type(method).__name__
        raise LowrankError(
            f"method {name} needs calibration data ({', '.join(sorted(resolved.needs))}): "
            "pass data=…"
        )
    if request.prefer == "speed":
        raise LowrankError("prefer='speed' times the layers at the data's shape: pass data=…")


def _workable(
    sites: Sequence[Site],
    resolved: Resolved,
    calibration: Calibration | None,
    request: Request,
    held: Collection[int],
) -> tuple[list[Site], list[str]]:
    """The sites, with a reason for targets that the method or the data rules out, and notes about
    those.

    Args:
        held: ids of layers that cannot be replaced.
    """
    kinds = ", ".join(sorted(resolved.method.kinds))
    kept: list[Site] = []
    unseen: list[str] = []
    ruled_out: dict[str, list[Site]] = {}
    for site in sites:
        reason = site.reason
        if not reason and not resolved.takes(site.kind):
            reason = f"the method takes {kinds}, not {site.kind}"
            ruled_out.setdefault("are of a kind that the method does not take", []).append(site)
        elif not reason and request.unit == "macs" and not site.cost.macs:
            reason = "a lookup takes no MACs, factors would"
        elif not reason and any(id(module) in held for module in site.modules):
            reason = "the model would not call another module in its place"
            ruled_out.setdefault(HELD, []).append(site)
        elif not reason and calibration is not None and not resolved.is_seen(site, calibration):
            unseen.append(site.title)
            if request.on_missing != "data-free":
                reason, few = _why_unseen(site, calibration)
                ruled_out.setdefault(few, []).append(site)
        kept.append(replace(site, reason=reason))
    if unseen and request.on_missing == "error":
        raise LowrankError(
            f"the calibration data gave {len(unseen)} layers too few tokens: {listed(unseen, 4)}; "
            "on_missing='dense' leaves them dense"
        )
    if all(site.reason for site in kept):
        for why in (ZEROS, HELD):
            if why in ruled_out:
                names = [site.title for site in ruled_out[why]]
                raise LowrankError(f"all {len(names)} targets {why}: {listed(names, 4)}")
        raise LowrankError(
            f"the calibration data reached none of the {len(unseen)} targets: {listed(unseen, 4)}"
            if unseen
            else f"the method takes {kinds} layers, but no target is one"
        )
    return kept, [_left(why, left) for why, left in ruled_out.items()]


def _why_unseen(site: Site, calibration: Calibration) -> tuple[str, str]:
    """The reason of one layer that the data does not show, and what a note says of all of them."""
    stats, least = statistics_of(site, calibration), max(calibration.min_tokens, 1)
    if site.name in calibration.observation.bypassed:
        reason = "its weight is read without calling the layer: no data reaches it"
        return reason, "are never called, only their weights are read,"
    if stats.count >= least:
        reason = "all inputs that the data gave it are zero: they show no direction to keep"
        return reason, ZEROS
    reason = f"the calibration data gave it {stats.count} tokens, fewer than {least}"
    if least > 1:
        return reason, f"were given fewer than {least} tokens by the data"
    return reason, "were not reached by the data"


def _held(sites: Sequence[Site], calibration: Calibration) -> set[int]:
    """Ids of the layers in whose place the model did not call another module."""
    names = calibration.observation.irreplaceable
    return {id(module) for site in sites if site.name in names for module in site.modules}


def _left(why: str, sites: Sequence[Site]) -> str:
    params = sum(site.cost.params for site in sites)
    names = listed([site.title for site in sites], 3)
    return (
        f"{len(sites)} layers with {params:,} parameters {why} and stay dense, not counted among "
        f"the targets: {names}"
    )


def _default_policy(parts: Decomposed, bench: Workbench | None, resolved: Resolved) -> str:
    """The default policy: uniform, but for mostly convolutional models lossaware where candidates
    can be judged, else spectrum.

    Layers of convolutional networks bear very different ranks, and uniform ones can be worse with
    data than spectrum's without: see docs/policies.md. Errors of language models' layers do not
    show where compression harms least, and judging each layer takes long on large models. Of codes
    in the norm "fisher" they do show it, and at sizes this coarse a layer alone wastes its share.
    """
    norms = {curve.norm for curve in parts.curves.values()}
    if mostly_convs(parts.sites) and len(norms) == 1:  # errors of several cannot be added
        return "spectrum" if bench is None or not bench.judge.can_judge() else "lossaware"
    by_codes = isinstance(resolved.method, Measured) and norms == {"fisher"}
    return "spectrum" if by_codes else "uniform"


def _decomposed(
    sites: Sequence[Site],
    resolved: Resolved,
    calibration: Calibration | None,
    request: Request,
    remember: bool,
    known: Mapping[str, Curve],
) -> Decomposed:
    """The curve of every group of targets, and of each form if the method compares forms."""
    targets = [site for site in sites if not site.reason]
    groups: list[Group] = [(site,) for site in targets]
    if resolved.joint is not None and calibration is not None:
        groups = groups_of(targets, resolved.joint, calibration)
    several = resolved.method if isinstance(resolved.method, SeveralForms) else None
    methods = {} if several is None else several.apart()
    forms: dict[str, Curves] = {form: {} for form in methods}
    curves: Curves = {}

    def measure(group: Group) -> tuple[Curve, list[Curve]]:
        """A group's curve, and those of the forms that it joins."""
        if several is None and group[0].name in known:
            return known[group[0].name], []
        if several is None:
            return _curve(group, resolved, calibration, request, remember), []
        each = [replace(resolved, method=method) for method in methods.values()]
        apart = [_curve(group, alone, calibration, request, remember) for alone in each]
        return several.joined(group[0], apart), apart

    found = dealt(partial(measure, group) for group in groups)
    for group, (curve, apart) in zip(steps(groups, "layer", request.progress), found, strict=True):
        curves[group[0].name] = curve
        give_back()
        for form, own in zip(forms, apart, strict=False):
            forms[form][group[0].name] = own
    return Decomposed(sites, groups, curves, forms)


def _curve(
    group: Group,
    resolved: Resolved,
    calibration: Calibration | None,
    request: Request,
    remember: bool,
) -> Curve:
    """A group's curve, cached in the calibration by method, statistics and weights."""
    names = [name for site in group for name in site.names]
    pinned = pattern_value(request.rank_pattern or {}, names) is not None
    ranked = pinned or request.ratio is None
    method = resolved.joint or resolved.method
    # Only a dataclass shows all that its curves depend on.
    if calibration is None or not remember or not is_dataclass(method):
        return resolved.curve(group, calibration, ranked=ranked)
    stats = statistics_of(group[0], calibration)
    digest = hashlib.sha256(f"{type(method)} {method!r} {resolved.storage} {ranked}".encode())
    for site in group:
        add_tensor(digest, repr(site.names), layouts.matrix(site.module))
    key = digest.hexdigest()
    kept = calibration.spectra.get(key)
    if kept is None or kept[0] is not stats:
        curve = resolved.curve(group, calibration, ranked=ranked)
        kept = calibration.spectra[key] = stats, curve
    return kept[1]


def _with_repeats(
    parts: Decomposed, sites: Sequence[Site], calibration: Calibration | None
) -> Decomposed:
    """For a MACs budget: the same with all costs times the layers' positions."""
    times = repeat_counts(sites, calibration)

    def priced(curves: Curves) -> Curves:
        return {name: often(curve, times.get(name, 1)) for name, curve in curves.items()}

    return Decomposed(
        sites=counted(parts.sites, times),
        groups=[tuple(counted(group, times)) for group in parts.groups],
        curves=priced(parts.curves),
        forms={form: priced(curves) for form, curves in parts.forms.items()},
        times=times,
    )


def _chosen(
    request: Request, goal: int, parts: Decomposed, whole: Cost, probe: Probe | None
) -> tuple[Allocation, Curves, dict[str, float]]:
    """An option per group, the curves it comes from, and the KL of each form.

    If the method has several forms and they can be judged, each form alone is compared with their
    mix on held-out KL; otherwise the KLs are empty.
    """
    stacks = parts.stacks()
    mixed = allocate(request, goal, stacks, parts.curves, whole, probe)
    if not parts.forms or probe is None or request.ratio is None:
        return mixed, parts.curves, {}
    tried = {"mixed": (mixed, parts.curves)}
    for form, curves in parts.forms.items():
        with suppress(LowrankError):  # a form that cannot reach the ratio
            tried[form] = allocate(request, goal, stacks, curves, whole, probe), curves
    values = measured(probe, [allocation for allocation, _ in tried.values()])
    compared = dict(zip(tried, values, strict=True))
    best = tried[min(compared, key=compared.__getitem__)]
    return *best, compared


def _entries(
    parts: Decomposed,
    chosen: Allocation,
    curves: Curves,
    request: Request,
    targets: set[tuple[str, ...]],
) -> tuple[Entry, ...]:
    """One plan entry per site considered.

    Args:
        targets: names of the sites that were asked for.
    """
    entries = {}
    for group, stack in zip(parts.groups, parts.stacks(), strict=True):
        option, curve = chosen[stack.names], curves[stack.name]
        options = [option] if len(group) == 1 else shared_basis.member_options(group, option)
        shared = "" if len(group) == 1 or option.dense else stack.name
        reason = why_dense(option, stack, curve, request)
        for site, part in zip(group, options, strict=True):
            times = parts.times.get(site.name, 1)
            entries[site.name] = Entry.of(
                site, part, curve, reason=reason, group=shared, repeats=times
            )
    for site in parts.sites:
        if site.name not in entries:
            dense = Entry.of(site, repeats=parts.times.get(site.name, 1))
            entries[site.name] = replace(dense, target=site.names in targets)
    return tuple(entries[site.name] for site in parts.sites)


def _settings(
    request: Request, resolved: Resolved, calibration: Calibration | None
) -> dict[str, Any]:
    """The settings needed to reproduce the plan."""
    policy = request.policy or "uniform"
    name = policy if isinstance(policy, str) else type(policy).__name__
    settings = {
        "method": resolved.name(),
        "called": list(resolved.called),
        "policy": "fixed" if request.ratio is None else name,
        "align": request.align,
        "storage": request.storage or own_form(request.method) or "factors",
        "prefer": request.prefer,
        "on_missing": request.on_missing,
        "seed": request.seed,
        "tokens": 0 if calibration is None else calibration.tokens,
        "data": "" if calibration is None else calibration.source,
        "recovery": None if request.recovery is None else request.recovery.to_json(),
        "versions": versions(),
    }
    if resolved.joint is not None:
        settings["alone"] = resolved.joint.alone
    return settings
