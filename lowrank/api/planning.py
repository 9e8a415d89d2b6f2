"""From a model and a request to a plan, by way of curves. Nothing is changed."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import layouts, linalg
from .. import sites as walk
from ..calibrate import Calibration
from ..data import rebatched
from ..entry import Entry, break_even
from ..errors import LowrankError, listed
from ..eval import kl
from ..methods import METHODS, SVD, for_kind, method, stored_as
from ..plan import Plan
from ..streams import twin
from ..types import Allocation, Curve, Method, Option, Probe, Site, Statistics
from .allocating import Curves, allocate
from .recovering import recover
from .request import Request, model_cost


def make_plan(
    model: nn.Module,
    request: Request,
    wanted: Sequence[Site],
    seen: Calibration | None,
    *,
    progress: bool,
) -> tuple[Plan, Curves]:
    """The plan, and the curve of every target by its site's name.

    Args:
        wanted: every site considered; those without a reason are the targets.
    """
    way = _method(request, seen)
    sites = _workable(wanted, way, seen, request)
    targets = [site for site in sites if not site.reason]
    bar = tqdm(targets, "decompose", delay=2, disable=not progress, leave=False)
    storage = request.storage or "factors"
    curves = {site.name: _curve(site, way, seen, storage) for site in bar}
    whole = model_cost(model, sites)
    counted = {site.names for site in wanted if not site.reason}
    goal = sum(site.cost.of(request.unit) for site in wanted if not site.reason)
    probe = _probe(model, targets, way, seen, request, curves)
    chosen = allocate(request, goal, targets, curves, whole, probe)
    entries = tuple(
        _entry(site, chosen.get(site.names), curves.get(site.name), request, site.names in counted)
        for site in sites
    )
    settings = {
        "method": _name_of(way, [curves[s.name] for s in targets if _is_seen(s, way, seen)]),
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
    return Plan(entries, whole, request.asked(), settings), curves


def _probe(
    model: nn.Module,
    targets: Sequence[Site],
    way: Method,
    seen: Calibration | None,
    request: Request,
    curves: Curves,
) -> Probe | None:
    """Held-out KL of the model with an allocation; None where there is nothing to judge by.

    Rows that the statistics were taken from serve where none was held out. All happens in a twin:
    the model is not touched. Where recovery follows, its closed form does here too: what is better
    before it need not be after.
    """
    if seen is None or callable(seen.batches) or any(site.name == "" for site in targets):
        return None
    held = seen.held_out or rebatched(seen.batches)[-2:]

    def probe(allocation: Allocation) -> float:
        work = []
        for site in targets:
            option = allocation[site.names]
            if option.dense:
                continue
            used = for_kind(way, site.kind)
            with torch.no_grad():
                new = used.factor(site.module, option, statistics_of(site, seen))
            work.append((site, _entry(site, option, curves[site.name], request, True), new))
        modules = {site.name: new for site, _, new in work}
        if request.recovery is not None and work:
            closed = replace(request.recovery, block_steps=0, distill_steps=0)
            damp = getattr(way, "damp", linalg.DAMP)
            modules = recover(model, work, seen, closed, damp=damp, progress=False).modules
        lean = twin(model)
        for site, _, _ in work:
            walk.replace(lean, walk.in_copy(site, lean), modules[site.name])
        return kl(lean, model, held)

    return probe


def statistics_of(site: Site, seen: Calibration | None) -> Statistics:
    """What the calibration saw of a site's input; count 0 where it saw nothing.

    Raises:
        LowrankError: the calibration saw inputs of another width.
    """
    stats = Statistics() if seen is None else seen.statistics.get(site.name, Statistics())
    if stats.gram is not None and len(stats.gram) != site.shape[1]:
        raise LowrankError(
            f"{site.title}: the calibration saw inputs of width {len(stats.gram)}, the layer reads "
            f"{site.shape[1]}: it was made for another model"
        )
    if stats.freq is not None and len(stats.freq) != site.shape[0]:
        raise LowrankError(
            f"{site.title}: the calibration counted {len(stats.freq)} ids, the table has "
            f"{site.shape[0]}: it was made for another model"
        )
    return stats


def versions() -> dict[str, str]:
    """Of Python and of the libraries that shape the numbers; those not loaded are left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("lowrank", "transformers"):
        if package in sys.modules:
            try:
                found[package] = version(package)
            except PackageNotFoundError:  # run from a source tree that was never installed
                found[package] = "source"
    return found


def _method(request: Request, seen: Calibration | None) -> Method:
    way = method(request.method or ("svd" if seen is None else "whitened"), request.seed)
    if way.needs and seen is None:
        needs = ", ".join(sorted(way.needs))
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


def _curve(site: Site, way: Method, seen: Calibration | None, storage: str) -> Curve:
    if not _is_seen(site, way, seen):
        return stored_as(SVD(), storage).curve(site, Statistics())  # on_missing="data-free"
    return stored_as(for_kind(way, site.kind), storage).curve(site, statistics_of(site, seen))


def _entry(
    site: Site, option: Option | None, curve: Curve | None, request: Request, target: bool
) -> Entry:
    option = option or Option("dense", None, "dense", site.cost, 0.0)
    return Entry(
        sites=site.names,
        shape=site.shape,
        dense=site.cost,
        method=option.method,
        size=option.size,
        storage=option.storage,
        cost=option.cost,
        error=option.error,
        total=None if curve is None else curve.total,
        norm="" if curve is None else curve.norm,
        target=target,
        rcond=None if curve is None else _rcond(curve),
        reason=site.reason if curve is None else _why_dense(option, site, curve, request),
        kind=site.kind,
        heads=layouts.heads(site.modules),
    )


def _why_dense(option: Option, site: Site, curve: Curve, request: Request) -> str:
    if not option.dense:
        return ""
    largest, rank = break_even(site.shape, *request.stored(site)) - 1, request.rank
    if len(curve.options) == 1:
        return "no rank makes a weight of this shape smaller"
    if isinstance(rank, float):
        return f"keeping {rank} of its energy takes a rank above {largest}, which is not smaller"
    if rank is not None and rank > largest:
        return f"at rank {rank} it would not be smaller; the largest that is: {largest}"
    if request.align is not None and largest < request.align:
        return f"no multiple of {request.align} makes it smaller; the largest rank is {largest}"
    return "not in rank_pattern" if request.ratio is None else "the policy keeps it dense"


def _rcond(curve: Curve) -> float | None:
    if curve.spectrum is None or not len(curve.spectrum):
        return None
    most = float(curve.spectrum[0])
    return float(curve.spectrum[-1]) / most if most > 0 else 0.0


def _name_of(way: Method, curves: Sequence[Curve]) -> str:
    """What the options of a method call it."""
    known = [name for name, kind in METHODS.items() if type(way) is kind]
    own = [option.method for curve in curves for option in curve.options if not option.dense]
    return (known + own + [_name(way)])[0]


def _name(given: object) -> str:
    return given if isinstance(given, str) else type(given).__name__
