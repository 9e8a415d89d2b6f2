"""Curves of forms sized by two numbers: few errors are computed, since each takes an iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import nn

from ..errors import LowrankError
from ..types import Cost, Curve, Option, Site, Size
from ..walk import layouts

FEW = 8  # up to so many sizes, all errors are computed
ANCHORS = 5  # beyond, sizes whose error is computed
SHARE = 0.2  # of the iterations, for anchors
TINY = 1e-12  # of the total: floor of the logarithm


def sampled_curve(
    site: Site,
    method: str,
    sizes: Iterable[Size],
    cost_of: Callable[..., Cost],
    error_of: Callable[[Size, float], float],
    total: float,
) -> Curve:
    """The curve of a form stored under its method's name, in the norm of the outputs.

    Up to `FEW` sizes, all errors are computed; beyond, those of `ANCHORS` sizes, with a fifth of
    the iterations, and the others are interpolated in the logarithm of the error.

    Args:
        sizes: cost rising; cut at the first that is not smaller than the dense weight.
        cost_of: of a size, given as separate numbers.
        error_of: of a size, with this share of the iterations.
    """
    costs: dict[Size, Cost] = {}
    for size in sizes:
        cost = cost_of(*size)
        if cost.params >= site.cost.params or cost.bytes >= site.cost.bytes:
            break
        costs[size] = cost
    every = list(costs)
    share = 1.0 if len(every) <= FEW else SHARE
    known = {place: min(error_of(every[place], share), total) for place in _anchors(len(every))}
    options = [
        Option(method, every[place], method, costs[every[place]], error)
        for place, error in _between(known, total).items()
    ]
    return Curve(site.names, pareto_front(site, options), total, None, "output", exact=False)


def pareto_front(site: Site, options: Iterable[Option]) -> tuple[Option, ...]:
    """The Pareto front of options of any sizes, and the dense option.

    All are smaller than the dense weight, and one that costs more, in parameters and in bytes, has
    less error. Of two that conflict, one with fewer parameters and one with fewer bytes, the one of
    less error stays.
    """
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost.params, o.cost.bytes, o.error)):
        cost = option.cost
        small = cost.params < site.cost.params and cost.bytes < site.cost.bytes
        if not small or (kept and not option.error < kept[-1].error):
            continue
        while kept and (cost.params <= kept[-1].cost.params or cost.bytes <= kept[-1].cost.bytes):
            kept.pop()
        kept.append(option)
    return (*kept, Option("dense", None, "dense", site.cost, 0.0))


def sizes_of(option: Option, module: nn.Module, what: str) -> tuple[int, int]:
    """The two numbers of an option's size; `what` names them.

    Raises:
        LowrankError: the size is not two numbers >= 1.
    """
    size = option.size or ()
    if len(size) != 2 or min(size) < 1:
        shape = tuple(layouts.matrix(module).shape)
        raise LowrankError(f"expected a size ({what}) for shape {shape}, got {option.size}")
    return size[0], size[1]


def _anchors(count: int) -> Sequence[int]:
    """Some of `count` positions, including the first and the last."""
    if count <= FEW:
        return range(count)
    return sorted({round((count - 1) * step / (ANCHORS - 1)) for step in range(ANCHORS)})


def _between(known: dict[int, float], total: float) -> dict[int, float]:
    """The error at every position, interpolated between the known ones."""
    floor, errors = TINY * total or 1.0, dict(known)
    for (low, below), (high, above) in pairwise(known.items()):
        start, end = math.log(max(below, floor)), math.log(max(above, floor))
        for place in range(low + 1, high):
            share = (place - low) / (high - low)
            errors[place] = min(math.exp(start + share * (end - start)), total)
    return errors
