"""From a model and a request to a plan, by way of curves. Nothing is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import is_dataclass, replace
from typing import Any, cast

from torch import nn
from tqdm.auto import tqdm

from ..calibration.digests import add_tensor
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError, listed
from ..measure.size import model_cost
from ..methods import JOINT, METHODS, SVD, Auto, Channels, for_kind, joint, method, stored_as
from ..methods.common import stacked
from ..plans.plan import Plan
from ..plans.versions import versions
from ..types import Curve, JointMethod, Method, Site, Statistics
from ..walk import layouts
from ..walk.sites import pattern_value
from .allocating import Curves, allocate
from .entries import entry_of
from .grouping import Group, groups_of, member_option
from .probing import probe_of
from .repeats import counted, often, repeats
from .request import Request


def make_plan(
    model: nn.Module,
    request: Request,
    wanted: Sequence[Site],
    seen: Calibration | None,
    *,
    progress: bool,
) -> tuple[Plan, Curves]:
    """The plan, and the curve of every target by its site's name, of a group by its first site's.

    Args:
        wanted: every site considered; those without a reason are the targets.
    """
    way, shared = _method(request, seen), joint(request.method, request.seed)
    sites = _workable(wanted, way, seen, request)
    targets = [site for site in sites if not site.reason]
    if request.policy is None and request.ratio is not None:
        request = replace(request, policy=_default_policy(targets, seen))
    groups, storage = groups_of(targets, shared, seen), request.storage or "factors"
    bar = tqdm(groups, "decompose", delay=2, disable=not progress, leave=False)
    forms = way.apart() if isinstance(way, Auto) else {}
    apart: dict[str, Curves] = {form: {} for form in forms}
    curves: Curves = {}
    for group in bar:
        name = group[0].name
        if isinstance(way, Auto):
            for form, one in forms.items():
                apart[form][name] = _remembered(group, one, shared, seen, storage)
            curves[name] = way.joined(group[0], [each[name] for each in apart.values()])
        else:
            ranked = _ranked(way, group, request)
            curves[name] = _remembered(group, ranked, shared, seen, storage)
    times = repeats(wanted, seen) if request.unit == "macs" else {}
    curves, *single = (
        {name: often(curve, times.get(name, 1)) for name, curve in some.items()}
        for some in (curves, *apart.values())
    )
    wanted, sites = counted(wanted, times), counted(sites, times)
    groups = [tuple(counted(group, times)) for group in groups]
    whole = model_cost(model, sites)
    asked_for = {site.names for site in wanted if not site.reason}
    goal = sum(site.cost.of(request.unit) for site in wanted if not site.reason)
    stacks = [group[0] if len(group) == 1 else stacked(group) for group in groups]
    together = {stack.names: group for stack, group in zip(stacks, groups, strict=True)}
    probe = probe_of(model, together, way, shared, seen, request)
    chosen = allocate(request, goal, stacks, curves, whole, probe)
    compared: dict[str, float] = {}
    if apart and probe is not None and request.ratio is not None:
        tried = {"mixed": (chosen, curves)}
        for form, some in zip(apart, single, strict=True):
            with suppress(LowrankError):  # a form that cannot get so small
                tried[form] = allocate(request, goal, stacks, some, whole, probe), some
        compared = {form: probe(allocation) for form, (allocation, _) in tried.items()}
        chosen, curves = tried[min(compared, key=compared.__getitem__)]
    made = {
        site.name: entry_of(
            site, option, curves[stack.name], request, True, stack, times.get(site.name, 1)
        )
        for group, stack in zip(groups, stacks, strict=True)
        for site, option in zip(group, member_option(group, chosen[stack.names]), strict=True)
    }
    entries = tuple(
        made.get(site.name)
        or entry_of(
            site, None, None, request, site.names in asked_for, site, times.get(site.name, 1)
        )
        for site in sites
    )
    own = [g for g in groups if (len(g) > 1 if shared else _is_seen(g[0], way, seen))]
    settings = {
        "method": _name_of(shared or way, [curves[group[0].name] for group in own]),
        "policy": "fixed" if request.ratio is None else _name(request.policy or "uniform"),
        "align": request.align,
        "storage": storage,
        "prefer": request.prefer,
        "on_missing": request.on_missing,
        "seed": request.seed,
        "tokens": 0 if seen is None else seen.tokens,
        "data": "" if seen is None else seen.source,
        "recovery": None if request.recovery is None else request.recovery.to_json(),
        "versions": versions(),
    }
    if compared:
        settings["forms"] = compared
    if shared is not None:
        settings["alone"] = shared.alone
    return Plan(entries, whole, request.asked(), settings), curves


def _default_policy(targets: Sequence[Site], seen: Calibration | None) -> str:
    """Uniform, but for convolutions without data: errors of the weights then say where a cut does
    the least harm (recipes/compress_resnet_cifar.py); those of a language model's do not."""
    convs = sum(site.cost.params for site in targets if site.kind == "conv")
    mostly = 2 * convs > sum(site.cost.params for site in targets)
    return "spectrum" if seen is None and mostly else "uniform"


def _method(request: Request, seen: Calibration | None) -> Method:
    """The method of single sites; of a joint method, the one that it names for those alone."""
    shared = joint(request.method, request.seed)
    named = request.method if shared is None else shared.alone
    way = method(cast(Any, named) or ("svd" if seen is None else "whitened"), request.seed)
    lacking = way.needs if shared is None else way.needs | shared.needs
    if lacking and seen is None:
        needs = ", ".join(sorted(lacking))
        raise LowrankError(
            f"method {_name(request.method)} works from calibration data ({needs}): pass data=…"
        )
    if request.prefer == "speed" and seen is None:
        raise LowrankError("prefer='speed' times the layers at the data's shape: pass data=…")
    return way


def _workable(
    sites: Sequence[Site], way: Method, seen: Calibration | None, request: Request
) -> list[Site]:
    """Targets of a kind that the method does not take stay dense; unseen ones as `on_missing`."""
    kept, unseen, kinds = [], [], ", ".join(sorted(way.kinds))
    for site in sites:
        if not site.reason and site.kind not in for_kind(way, site.kind).kinds:
            site = replace(site, reason=f"the method takes {kinds}, not {site.kind}")
        elif not site.reason and request.unit == "macs" and not site.cost.macs:
            site = replace(site, reason="looking up takes no products, and factors would")
        elif not site.reason and seen is not None and not _is_seen(site, way, seen):
            unseen.append(site.title)
            count, least = statistics_of(site, seen).count, max(seen.min_tokens, 1)
            if request.on_missing != "data-free":
                said = f"the calibration gave it {count} tokens, fewer than {least}"
                site = replace(site, reason=said)
        kept.append(site)
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


def _is_seen(site: Site, way: Method, seen: Calibration | None) -> bool:
    """Whether there are the statistics that the method needs."""
    way = for_kind(way, site.kind)
    if seen is None or not way.needs:
        return True
    return statistics_of(site, seen).count >= max(seen.min_tokens, 1)


def _ranked(way: Method, group: Group, request: Request) -> Method:
    """A fixed rank of a convolution is one of channels: options of other sizes are left out."""
    names = [name for site in group for name in site.names]
    fixed = pattern_value(request.rank_pattern or {}, names) is not None
    if group[0].kind != "conv" or not (fixed or request.ratio is None):
        return way
    return Channels(way) if "conv" in way.kinds else way


def _remembered(
    group: Group, way: Method, shared: JointMethod | None, seen: Calibration | None, storage: str
) -> Curve:
    """The curve; from the calibration where the same statistics and weights gave it before."""
    used = way if shared is None else shared
    if seen is None or not is_dataclass(used):  # another object does not say what it depends on
        return _curve(group, way, shared, seen, storage)
    stats = statistics_of(group[0], seen)
    key = _key(group, f"{type(used).__module__} {used!r} {storage}")
    found = seen.spectra.get(key)
    if found is None or found[0] is not stats:
        found = seen.spectra[key] = stats, _curve(group, way, shared, seen, storage)
    return found[1]


def _key(group: Group, settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for site in group:
        add_tensor(digest, repr(site.names), layouts.matrix(site.module))
    return digest.hexdigest()


def _curve(
    group: Group, way: Method, shared: JointMethod | None, seen: Calibration | None, storage: str
) -> Curve:
    site = group[0]
    if shared is not None and len(group) > 1:
        return shared.curve(group, statistics_of(site, seen))
    if not _is_seen(site, way, seen):
        return stored_as(SVD(), storage).curve(site, Statistics())  # on_missing="data-free"
    return stored_as(for_kind(way, site.kind), storage).curve(site, statistics_of(site, seen))


def _name_of(way: Method | JointMethod, curves: Sequence[Curve]) -> str:
    """What the options of a method call it."""
    every = (*METHODS.items(), *JOINT.items())
    named = getattr(way, "name", "")  # where it depends on the options
    known = [name for name, kind in every if type(way) is kind]
    own = [option.method for curve in curves for option in curve.options if not option.dense]
    return named or (known + own + [_name(way)])[0]


def _name(given: object) -> str:
    return given if isinstance(given, str) else type(given).__name__
