"""Fused matrices (qkv_proj, gate_up_proj) as a whole or by parts, whichever is nearer.

One decomposition of a fused matrix gives its parts one input basis; by parts each has a basis and a
rank of its own. Which is nearer at equal cost depends on the weights, the ratio and the storage, so
both are measured, in the norm of the method's curves. Where the parts end is seen in the model's
use of the layer (calibration/cuts.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from torch import nn

from ..calibration.statistics import Calibration
from ..errors import LowrankError, listed
from ..nn.expert_weights import ExpertWeights
from ..nn.split_linear import SplitLinear
from ..nn.unfused import Unfused
from ..plans.plan import Plan
from ..policies import policy_of
from ..types import Budget, Curve, Site, Statistics
from ..walk import layouts
from ..walk.parts import separate_linear
from ..walk.sites import site_of
from ..walk.surgery import module_at, modules_of
from .request import Request

Sizes = Mapping[str, Sequence[int]]  # outputs of each part, by the fused layer's name


class Parted(NamedTuple):
    """What is to be factored, once fused layers are split.

    Attributes:
        sizes: of the layers that were split.
        whole: names of those that were compared, and stay.
        curves: of the sites that were compared, by name: nothing is decomposed twice.
    """

    sites: list[Site]
    wanted: list[Site]
    calibration: Calibration | None
    sizes: dict[str, list[int]]
    whole: tuple[str, ...] = ()
    curves: Mapping[str, Curve] = MappingProxyType({})

    def noted(self, plan: Plan) -> Plan:
        """The plan with the layers that were split, which `apply` has to split again."""
        if not self.sizes:
            return plan
        many, all_names = len(self.sizes), [*self.sizes, *self.whole]
        note = (
            f"{many} of {len(all_names)} fused matrices are factored by parts, which is nearer at "
            f"equal cost: {listed(self.sizes, 3)}"
        )
        notes = [*(plan.settings.get("notes") or ()), note]
        return replace(plan, settings={**plan.settings, "parts": self.sizes, "notes": notes})


def parted(
    model: nn.Module,
    sites: Sequence[Site],
    wanted: Sequence[Site],
    calibration: Calibration | None,
    request: Request,
) -> Parted:
    """Split the fused layers that are nearer by parts, until the end of `separate_parts`.

    Args:
        sites: all of the model.
        wanted: the same with reasons: those without are the targets.
    """
    same = Parted(list(sites), list(wanted), calibration, {})
    if calibration is None or request.ratio is None or request.rank_pattern:
        return same
    resolved = request.resolved(data=True)
    if resolved.joint is not None:  # shares a basis among all that read one tensor anyway
        return same
    sizes: dict[str, list[int]] = {}
    whole: list[str] = []
    curves: dict[str, Curve] = {}
    inner = _parts_of_others(model)
    for site in wanted:
        cut = calibration.observation.cuts.get(site.name, ())
        if len(cut) < 2 or site.reason or id(site.module) in inner or not _can_split(site):
            continue
        if not resolved.is_seen(site, calibration):
            continue
        one = resolved.curve([site], calibration)
        put_back = separate_linear(model, site.name, cut)
        parts = _parts(site)
        seen = of_calibration(calibration, {site.name: cut})
        each = {part.name: resolved.curve([part], seen) for part in parts}
        if _error(list(each.values()), site, request) < _error([one], site, request):
            sizes[site.name] = list(cut)
            curves |= each
        else:
            put_back()
            whole.append(site.name)
            curves[site.name] = one
    return Parted(
        of_sites(sites, sizes), of_sites(wanted, sizes), of_calibration(calibration, sizes), sizes,
        tuple(whole), curves,
    )  # fmt: skip


def split_as_planned(model: nn.Module, plan: Plan) -> Sizes:
    """Split the fused layers that a plan has by parts, until the end of `separate_parts`.

    Raises:
        LowrankError: the model has no such linear layer, or with other outputs.
    """
    sizes: Sizes = plan.settings.get("parts") or {}
    for name, cut in sizes.items():
        module = module_at(model, name)
        if isinstance(module, SplitLinear) and list(module.sizes) == list(cut):
            continue
        fits = layouts.kind(module) == "linear" and not layouts.obstacle(module)
        fits = fits and "forward" not in vars(module)
        if not fits or len(layouts.matrix(module)) != sum(cut):
            raise LowrankError(
                f"the plan was made for another model: it has {name} in parts of {list(cut)} "
                f"outputs, which this {type(module).__name__} cannot be split into"
            )
        separate_linear(model, name, cut)
    return sizes


def of_sites(sites: Sequence[Site], sizes: Sizes) -> list[Site]:
    """The sites, with those of split layers by parts."""
    found: list[Site] = []
    for site in sites:
        cut = sizes.get(site.name)
        parts = [] if cut is None else _parts(site)
        found += [replace(part, reason=site.reason) for part in parts] or [site]
    return found


def of_calibration(calibration: Calibration | None, sizes: Sizes) -> Calibration | None:
    """The calibration as if it had met the parts of these layers, which share their input."""
    if calibration is None:
        return None
    known = {n: cut for n, cut in sizes.items() if n in calibration.statistics}
    if not known:
        return calibration
    observed = calibration.observation

    def names(given: Iterable[str]) -> tuple[str, ...]:
        every = ((f"{n}.{i}" for i in range(len(known[n]))) if n in known else (n,) for n in given)
        return tuple(name for each in every for name in each)

    def spread(given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for n, value in given.items() for name in names([n])}

    statistics = spread(calibration.statistics)
    for name, cut in known.items():
        own = calibration.statistics[name]
        statistics.update(zip(names([name]), _statistics(own, cut), strict=True))
    observation = replace(
        observed,
        order=names(observed.order),
        groups=tuple(map(names, observed.groups)),
        shapes=spread(observed.shapes),
        bypassed=names(observed.bypassed),
        irreplaceable=names(observed.irreplaceable),
        calls=spread(observed.calls),
        cuts={name: cut for name, cut in observed.cuts.items() if name not in known},
    )
    padded = names(calibration.padded)
    return replace(calibration, statistics=statistics, observation=observation, padded=padded)


def _statistics(whole: Statistics, cut: Sequence[int]) -> list[Statistics]:
    """Those of each part: the input's are shared, the outputs' are its block."""
    found, start = [], 0
    for size in cut:
        rows = slice(start, start + size)
        out, fisher = whole.out_gram, whole.row_fisher
        found.append(
            replace(
                whole,
                out_gram=None if out is None else out[rows, rows].clone(),
                row_fisher=None if fisher is None else fisher[rows].clone(),
            )
        )
        start += size
    return found


def _parts(site: Site) -> list[Site]:
    """The sites of a layer that is split."""
    return [
        site_of(part, tuple(f"{name}.{i}" for name in site.names))
        for i, part in enumerate(cast(Unfused, site.module).layers().values())
    ]


def _error(curves: Sequence[Curve], site: Site, request: Request) -> float:
    """The least error at the request's ratio of the site; infinite where it cannot be reached.

    Ranks of parts are as unlike as the policy's: of equal share, or by their errors.
    """
    ratio, unit = Fraction(str(request.ratio)), request.unit
    name = "uniform" if request.policy in (None, "uniform") else "spectrum"
    try:
        budget = Budget(math.floor(ratio * site.cost.of(unit)), unit)
        chosen = policy_of(name)(curves, budget, None)
    except LowrankError:
        return math.inf
    return sum(option.error for option in chosen.values())


def _can_split(site: Site) -> bool:
    """Whether the layer may change its class, and is one alone."""
    return site.name != "" and len(site.modules) == 1 and "forward" not in vars(site.module)


def _parts_of_others(model: nn.Module) -> set[int]:
    """Ids of the layers that are parts of another module already."""
    holders = [m for _, m in modules_of(model) if isinstance(m, Unfused | ExpertWeights)]
    return {id(layer) for holder in holders for layer in holder.children()}
