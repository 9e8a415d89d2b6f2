"""Curves made from singular values, and searches through all that a policy may choose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import torch

from lowrank.types import Budget, Cost, Curve, Option, Unit


def curve(
    name: str,
    shape: tuple[int, int],
    spectrum: Sequence[float] | None = None,
    *,
    norm: str = "weight",
    itemsize: int = 4,
) -> Curve:
    """Every rank below break-even, and the dense weight."""
    values = np.array(falling(min(shape)) if spectrum is None else spectrum, dtype=float)
    assert len(values) == min(shape)
    size, per_rank = math.prod(shape), sum(shape)
    options = []
    for rank in range(1, min(shape) + 1):
        cost = rank * per_rank
        error = float((values[rank:] ** 2).sum())
        if cost < size and (not options or error < options[-1].error):
            options.append(Option("svd", (rank,), "factors", of(cost, itemsize), error))
    options.append(Option("dense", None, "dense", of(size, itemsize), 0.0))
    total = float((values**2).sum())
    return Curve((name,), tuple(options), total, torch.from_numpy(values), norm, True)


def of(params: int, itemsize: int = 4) -> Cost:
    return Cost(params, params * itemsize, params)


def falling(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.sort(rng.gamma(1.0, 1.0, count) + 1e-3)[::-1].copy()


def some_curves(seed: int, count: int, sizes: tuple[int, int] = (6, 40)) -> list[Curve]:
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        shape = tuple(int(n) for n in rng.integers(*sizes, size=2))
        scale = 10 ** rng.uniform(-1, 1)
        values = falling(min(shape), int(rng.integers(1 << 30))) ** rng.uniform(0.3, 3) * scale
        itemsize = int(rng.choice([2, 4]))
        found.append(curve(f"layer{index}", shape, values, itemsize=itemsize))
    return found


def whole(curves: Iterable[Curve], unit: Unit = "params") -> int:
    return sum(curve.dense.cost.of(unit) for curve in curves)


def budget(curves: Sequence[Curve], keep: Fraction | str, unit: Unit = "params") -> Budget:
    return Budget(math.floor(Fraction(keep) * whole(curves, unit)), unit)


def spent(found: Mapping[tuple[str, ...], Option], unit: Unit = "params") -> int:
    return sum(option.cost.of(unit) for option in found.values())


def lost(found: Mapping[tuple[str, ...], Option]) -> float:
    return sum(option.error for option in found.values())


def least_error(curves: Sequence[Curve], limit: int) -> float:
    """Of all combinations of options within the limit."""
    every = product(*(curve.options for curve in curves))
    fitting = (combo for combo in every if sum(o.cost.params for o in combo) <= limit)
    return min(sum(option.error for option in combo) for combo in fitting)


def dual_bound(curves: Sequence[Curve], limit: int) -> float:
    """The Lagrangian's best lower bound: prices where any two options of a curve cost the same."""
    prices = {0.0}
    for one in curves:
        for cheap, dear in product(one.options, one.options):
            extra = dear.cost.params - cheap.cost.params
            if extra > 0 and cheap.error > dear.error:
                prices.add((cheap.error - dear.error) / extra)
    return max(
        sum(min(o.error + price * o.cost.params for o in one.options) for one in curves)
        - price * limit
        for price in prices
    )
