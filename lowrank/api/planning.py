"""From a model and a request to a plan: curves, budget, policy, alignment. Nothing is changed."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import sites as walk
from ..calibrate import Calibration
from ..errors import LowrankError, listed
from ..methods import SVD, method
from ..plan import Entry, Plan, check_rank
from ..policies import Energy, policy
from ..policies.common import at_most, nearly_free_alignment, only_aligned, smallest
from ..types import Allocation, Budget, Cost, Curve, Method, Option, Site, Statistics
from .request import Request, model_cost, targets_of

Curves = dict[str, Curve]


def make_plan(
    model: nn.Module, request: Request, seen: Calibration | None, *, progress: bool
) -> tuple[Plan, Curves]:
    """The plan, and the curve of every target by its site's name."""
    way = method(request.method or ("svd" if seen is None else "whitened"), request.seed)
    if way.needs and seen is None:
        raise LowrankError(
            f"method {_name(request.method)} needs {', '.join(sorted(way.needs))}: pass data=…"
        )
    wanted = targets_of(model, request)
    sites = _without_unseen(wanted, way, seen, request)
    counted = {site.names for site in wanted if not site.reason}
    targets = [site for site in sites if not site.reason]
    bar = tqdm(targets, "decompose", delay=2, disable=not progress, leave=False)
    curves = {site.name: _curve(site, way, seen) for site in bar}
    whole = model_cost(model, sites)
    goals = [site.cost.of(request.unit) for site in wanted if not site.reason]
    chosen = _allocate(request, sum(goals), targets, curves, whole)
    entries = tuple(
        _entry(site, chosen.get(site.names), curves.get(site.name), request, site.names in counted)
        for site in sites
    )
    settings = {
        "method": curves[targets[0].name].options[0].method if targets else "dense",
        "policy": _name(request.policy or ("uniform" if request.rank is None else "fixed")),
        "align": request.align,
        "prefer": request.prefer,
        "on_missing": request.on_missing,
        "seed": request.seed,
        "tokens": 0 if seen is None else seen.tokens,
        "versions": versions(),
    }
    return Plan(entries, whole, request.asked(), settings), curves


def statistics_of(site: Site, seen: Calibration | None) -> Statistics:
    return Statistics() if seen is None else seen.statistics.get(site.name, Statistics())


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


def _without_unseen(
    sites: Sequence[Site], way: Method, seen: Calibration | None, request: Request
) -> list[Site]:
    """Targets that the calibration did not reach follow `on_missing`."""
    if not way.needs or seen is None or request.on_missing == "data-free":
        return list(sites)
    kept, unseen = [], []
    for site in sites:
        count = statistics_of(site, seen).count
        if not site.reason and count < max(seen.min_tokens, 1):
            unseen.append(site.name)
            said = f"the calibration gave it {count} tokens, fewer than {max(seen.min_tokens, 1)}"
            site = replace(site, reason=said)
        kept.append(site)
    if unseen and request.on_missing == "error":
        raise LowrankError(f"the calibration reached too little of {listed(unseen)}")
    if not any(not site.reason for site in kept):
        raise LowrankError(f"the calibration reached none of the targets: {listed(unseen)}")
    return kept


def _curve(site: Site, way: Method, seen: Calibration | None) -> Curve:
    stats = statistics_of(site, seen)
    if way.needs and seen is not None and stats.count < max(seen.min_tokens, 1):
        return SVD().curve(site, Statistics())  # on_missing="data-free"
    return way.curve(site, stats)


def _allocate(
    request: Request, goal: int, targets: Sequence[Site], curves: Curves, whole: Cost
) -> Allocation:
    """One option for every target; `goal` is the dense cost that the ratio refers to."""
    pinned = _pinned(request.rank_pattern or {}, targets, curves)
    free = [curves[site.name] for site in targets if site.names not in pinned]
    if request.rank is not None:
        return {**_fixed(request.rank, free), **pinned}
    if request.ratio is None or not free:
        return {**{curve.sites: curve.dense for curve in free}, **pinned}
    if request.align is not None:
        free = only_aligned(free, request.align)
    total = goal if request.of == "targets" else whole.of(request.unit)
    kept = sum(option.cost.of(request.unit) for option in pinned.values())
    dense = sum(curve.dense.cost.of(request.unit) for curve in curves.values())
    # Beside the free sites stand the pinned ones at their new cost and all else as it is.
    budget = _budget(request, total, total - dense + kept, free)
    found = policy(request.policy or "uniform")(free, budget, None)
    if request.align is None:
        found = nearly_free_alignment(free, found, request.unit)
    return {**found, **pinned}


def _pinned(
    patterns: Mapping[str, int | float], targets: Sequence[Site], curves: Curves
) -> dict[tuple[str, ...], Option]:
    """The options that `rank_pattern` fixes; above break-even is an error here."""
    found = {}
    for site in targets:
        key = walk.pattern_value(patterns, site.names)
        if key is None:
            continue
        value = patterns[key]
        if isinstance(value, int):
            check_rank(site.name, site.shape, value)
        found.update(_fixed(value, [curves[site.name]]))
    return found


def _fixed(rank: int | float, curves: Sequence[Curve]) -> dict[tuple[str, ...], Option]:
    if isinstance(rank, float):
        return dict(Energy(share=rank)(curves, Budget(0))) if curves else {}
    found = {}
    for curve in curves:
        largest = max((o.size[0] for o in curve.options if o.size is not None), default=0)
        option = at_most(curve, rank)
        found[curve.sites] = curve.dense if option is None or rank > largest else option
    return found


def _budget(request: Request, total: int, rest: int, free: Sequence[Curve]) -> Budget:
    """What is left for the sites that the policy may choose for, `rest` being fixed.

    Raises:
        LowrankError: not even the smallest options fit; the smallest reachable ratio is named.
    """
    # The decimal that was written, not its binary neighbour: 0.29 · 100 is 29.
    limit = math.floor(Fraction(str(request.ratio)) * total) - rest
    least = smallest(free, request.unit)
    if limit < least:
        reachable = math.ceil((rest + least) / total * 10_000) / 10_000
        raise LowrankError(
            f"ratio {request.ratio} of the {request.of} cannot be reached: with every free target "
            f"at its smallest form {reachable:.4f} of the {request.unit} are kept; "
            "ask for at least that"
        )
    return Budget(limit, request.unit)


def _entry(
    site: Site, option: Option | None, curve: Curve | None, request: Request, target: bool
) -> Entry:
    dense = Option("dense", None, "dense", site.cost, 0.0)
    option = option or dense
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
        reason=site.reason or ("" if curve is None else _why_dense(option, curve, request)),
    )


def _why_dense(option: Option, curve: Curve, request: Request) -> str:
    if not option.dense:
        return ""
    largest = max((o.size[0] for o in curve.options if o.size is not None), default=0)
    if largest == 0:
        return "no rank makes a weight of this shape smaller"
    if isinstance(request.rank, int):
        return f"at rank {request.rank} it would not be smaller; the largest that is: {largest}"
    if request.rank is not None:
        return f"that share of its energy needs a rank above {largest}, which is not smaller"
    if request.ratio is None:
        return "not in rank_pattern"
    return "the policy keeps it dense"


def _rcond(curve: Curve) -> float | None:
    if curve.spectrum is None or not len(curve.spectrum):
        return None
    most = float(curve.spectrum[0])
    return float(curve.spectrum[-1]) / most if most > 0 else 0.0


def _name(given: object) -> str:
    return given if isinstance(given, str) else type(given).__name__
