"""From a model and a request to a plan, by way of curves. Nothing is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..calibration.digests import add_tensor
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError, listed
from ..measure.size import model_cost
from ..methods.common import stacked
from ..methods.resolved import Resolved, own_form
from ..plans import shared_basis
from ..plans.entry import Entry
from ..plans.plan import Plan, versions
from ..recover.chain import Workbench
from ..types import Allocation, Cost, Curve, Probe, SeveralForms, Site
from ..walk import layouts
from ..walk.sites import pattern_value
from .allocating import Curves, allocate, probe_of, why_dense
from .grouping import Group, groups_of
from .positions import counted, often, repeat_counts
from .request import Request


@dataclass(frozen=True)
class Decomposed:
    """What there is to choose from.

    Attributes:
        sites: every site considered; those without a reason are the targets.
        groups: the targets, sites that share a basis together, the owner first.
        curves: by the name of a group's first site.
        forms: of a method of several forms, the curves of each form alone.
        times: where products are the budget, how often a layer works for one time of the one that
            works least often; by name.
    """

    sites: Sequence[Site]
    groups: Sequence[Group]
    curves: Curves
    forms: Mapping[str, Curves] = field(default_factory=dict)
    times: Mapping[str, int] = field(default_factory=dict)

    def stacks(self) -> list[Site]:
        """Each group as one site."""
        return [group[0] if len(group) == 1 else stacked(group) for group in self.groups]


def make_plan(
    model: nn.Module,
    request: Request,
    sites: Sequence[Site],
    calibration: Calibration | None,
    bench: Workbench | None,
    *,
    remember: bool = False,
) -> tuple[Plan, Curves, Resolved]:
    """The plan, the curve of every target by the name of its site, of a group by its first site's,
    and what they were made by.

    Args:
        sites: every site considered; those without a reason are the targets.
        bench: to judge on; None where nothing can be judged.
        remember: the calibration will be there for the next plan: let it keep the curves.
    """
    resolved = request.resolved(data=calibration is not None)
    _check_data(request, resolved, calibration)
    taken = _workable(sites, resolved, calibration, request)
    if request.policy is None and request.ratio is not None:
        request = replace(request, policy=_default_policy(taken, calibration))
    parts = _decomposed(taken, resolved, calibration, request, remember)
    resolved = resolved.knowing(
        parts.curves[group[0].name]
        for group in parts.groups
        if len(group) > 1 or resolved.is_seen(group[0], calibration)  # others are data-free
    )
    if request.unit == "macs":
        parts = _with_repeats(parts, sites, calibration)
        sites = counted(sites, parts.times)
    whole = model_cost(model, parts.sites)
    targets = [site for site in sites if not site.reason]
    goal = sum(site.cost.of(request.unit) for site in targets)
    named = {s.names: g for s, g in zip(parts.stacks(), parts.groups, strict=True)}
    is_layer = any(site.name == "" for site in parts.sites)  # and no model around it to judge
    probe = None if bench is None or is_layer else probe_of(bench, named, resolved, request)
    chosen, curves, compared = _chosen(request, goal, parts, whole, probe)
    entries = _entries(parts, chosen, curves, request, {site.names for site in targets})
    settings = _settings(request, resolved, calibration)
    if compared:
        settings["forms"] = compared
    return Plan(entries, whole, request.asked(), settings), curves, resolved


def _check_data(request: Request, resolved: Resolved, calibration: Calibration | None) -> None:
    """Raises LowrankError for what works from data, where there is none."""
    if calibration is not None:
        return
    if resolved.needs:
        named = request.method if isinstance(request.method, str) else type(request.method).__name__
        raise LowrankError(
            f"method {named} works from calibration data ({', '.join(sorted(resolved.needs))}): "
            "pass data=…"
        )
    if request.prefer == "speed":
        raise LowrankError("prefer='speed' times the layers at the data's shape: pass data=…")


def _workable(
    sites: Sequence[Site], resolved: Resolved, calibration: Calibration | None, request: Request
) -> list[Site]:
    """Targets of a kind that the method does not take stay dense; unseen ones as `on_missing`."""
    kinds = ", ".join(sorted(resolved.method.kinds))
    kept: list[Site] = []
    unseen: list[str] = []
    for site in sites:
        reason = site.reason
        if not reason and not resolved.takes(site.kind):
            reason = f"the method takes {kinds}, not {site.kind}"
        elif not reason and request.unit == "macs" and not site.cost.macs:
            reason = "looking up takes no products, and factors would"
        elif not reason and calibration is not None and not resolved.is_seen(site, calibration):
            unseen.append(site.title)
            if request.on_missing != "data-free":
                count = statistics_of(site, calibration).count
                least = max(calibration.min_tokens, 1)
                reason = f"the calibration gave it {count} tokens, fewer than {least}"
        kept.append(replace(site, reason=reason))
    if unseen and request.on_missing == "error":
        raise LowrankError(
            f"the calibration reached too little of {len(unseen)} layers: {listed(unseen, 4)}; "
            "on_missing='dense' would leave them as they are"
        )
    if all(site.reason for site in kept):
        raise LowrankError(
            f"the calibration reached none of the {len(unseen)} targets: {listed(unseen, 4)}"
            if unseen
            else f"the method takes {kinds}, and none of the targets is of that kind"
        )
    return kept


def _default_policy(sites: Sequence[Site], calibration: Calibration | None) -> str:
    """Uniform, but for convolutions without data: errors of the weights then say where a cut does
    the least harm (recipes/compress_resnet_cifar.py); those of a language model's do not."""
    targets = [site for site in sites if not site.reason]
    convs = sum(site.cost.params for site in targets if site.kind == "conv")
    mostly = 2 * convs > sum(site.cost.params for site in targets)
    return "spectrum" if calibration is None and mostly else "uniform"


def _decomposed(
    sites: Sequence[Site],
    resolved: Resolved,
    calibration: Calibration | None,
    request: Request,
    remember: bool,
) -> Decomposed:
    """Every target's curve, and where forms are compared those of each form."""
    targets = [site for site in sites if not site.reason]
    groups: list[Group] = [(site,) for site in targets]
    if resolved.joint is not None and calibration is not None:
        groups = groups_of(targets, resolved.joint, calibration)
    several = resolved.method if isinstance(resolved.method, SeveralForms) else None
    apart = {} if several is None else several.apart()
    forms: dict[str, Curves] = {form: {} for form in apart}
    curves: Curves = {}
    for group in tqdm(groups, "decompose", delay=2, disable=not request.progress, leave=False):
        name = group[0].name
        for form, method in apart.items():
            alone = replace(resolved, method=method)
            forms[form][name] = _curve(group, alone, calibration, request, remember)
        if several is None:
            curves[name] = _curve(group, resolved, calibration, request, remember)
        else:
            curves[name] = several.joined(group[0], [each[name] for each in forms.values()])
    return Decomposed(sites, groups, curves, forms)


def _curve(
    group: Group,
    resolved: Resolved,
    calibration: Calibration | None,
    request: Request,
    remember: bool,
) -> Curve:
    """A group's curve; from the calibration where the same statistics and weights gave it."""
    names = [name for site in group for name in site.names]
    pinned = pattern_value(request.rank_pattern or {}, names) is not None
    ranked = pinned or request.ratio is None
    method = resolved.joint or resolved.method
    # Another object does not say what its curves depend on.
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
    """Where products are the budget: costs count every position that a layer works at."""
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
    """An option for every group, the curves that it is of, and the KL of each form where a mix of
    forms was compared with each of them alone."""
    stacks = parts.stacks()
    mixed = allocate(request, goal, stacks, parts.curves, whole, probe)
    if not parts.forms or probe is None or request.ratio is None:
        return mixed, parts.curves, {}
    tried = {"mixed": (mixed, parts.curves)}
    for form, curves in parts.forms.items():
        with suppress(LowrankError):  # a form that cannot get so small
            tried[form] = allocate(request, goal, stacks, curves, whole, probe), curves
    compared = {form: probe(allocation) for form, (allocation, _) in tried.items()}
    best = tried[min(compared, key=compared.__getitem__)]
    return *best, compared


def _entries(
    parts: Decomposed,
    chosen: Allocation,
    curves: Curves,
    request: Request,
    targets: set[tuple[str, ...]],
) -> tuple[Entry, ...]:
    """One line for every site considered.

    Args:
        targets: names of the sites that were asked for.
    """
    made = {}
    for group, stack in zip(parts.groups, parts.stacks(), strict=True):
        option, curve = chosen[stack.names], curves[stack.name]
        options = [option] if len(group) == 1 else shared_basis.member_options(group, option)
        shared = "" if len(group) == 1 or option.dense else stack.name
        reason = why_dense(option, stack, curve, request)
        for site, part in zip(group, options, strict=True):
            times = parts.times.get(site.name, 1)
            made[site.name] = Entry.of(
                site, part, curve, reason=reason, group=shared, repeats=times
            )
    for site in parts.sites:
        if site.name not in made:
            left = Entry.of(site, repeats=parts.times.get(site.name, 1))
            made[site.name] = replace(left, target=site.names in targets)
    return tuple(made[site.name] for site in parts.sites)


def _settings(
    request: Request, resolved: Resolved, calibration: Calibration | None
) -> dict[str, Any]:
    """What is needed to repeat the plan."""
    policy = request.policy or "uniform"
    named = policy if isinstance(policy, str) else type(policy).__name__
    settings = {
        "method": resolved.name(),
        "called": list(resolved.called),
        "policy": "fixed" if request.ratio is None else named,
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
