"""Two small tables for a large one, read by quotient and remainder (arXiv 1909.02107).

e_i = Q[i // m] ∘ R[i mod m]: see nn/quotient_remainder.py. It shrinks the number of rows, where low
rank shrinks their width, so that tables much longer than wide become far smaller than at rank one.
Ids that share a row of Q or R have nothing else in common. Of a *trained* table in random order
nearly all is lost (of 1000 random rows 0.89 of the energy at 40 + 25), so that it is for training,
from the start or from there on. For products only the longer table has the scale of the rows, and
the shorter is near one: the other way round, training by Adam ends far behind (recipes/dlrm.py at a
quarter: log-loss 1.93 for 1.80).

From m = ⌈√V⌉, the fewest rows, m grows with the budget: then ids below m have a row of R that they
share with later ones only. Where ids are sorted by frequency the frequent ones lose little, fitted
to a trained table too. Hetu's code takes m ≤ √V, where neighbours share (there 1.88 for 1.80).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError, unknown
from ..nn import QuotientRemainderEmbedding, quotient_remainder_cost
from ..nn.quotient_remainder import OPS
from ..types import Curve, Option, Site, Size, Statistics
from ..walk import layouts
from .common import check_padding, refuse_head
from .random import fingerprint
from .sampled import pareto_front, sizes_of

STARTS = ("nearest", "random")
STEP = 0.03  # between sizes, of m
FEW = 16  # up to so many sizes, all errors are computed
ANCHORS = 7  # beyond, sizes whose error is computed


@dataclass(frozen=True)
class QuotientRemainder:
    """Options: `op`, one of "mult", "add" and "concat"; `start`: the "nearest" tables, or "random"
    ones of the table's scale, drawn by `seed`, for training from nothing.

    Sizes are (m, columns of R). The curve is not exact: in large tables an interpolation between a
    few sizes, and of random tables the share of the numbers that is left out.
    """

    seed: int = 0
    op: str = "mult"
    start: str = "nearest"
    kinds = frozenset({"embedding"})
    needs = frozenset[str]()
    own_form = "quotient-remainder"

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise unknown("op", str(self.op), OPS)
        if self.start not in STARTS:
            raise unknown("start", str(self.start), STARTS)

    @property
    def name(self) -> str:
        return "quotient-remainder" + ("" if self.op == "mult" else f"-{self.op}")

    def curve(self, site: Site, stats: Statistics) -> Curve:
        refuse_head(site, "a table by quotient and remainder")
        check_padding(site.module, "two tables")
        table = layouts.matrix(site.module).detach()
        total = float(table.double().square().sum())
        costs = {}
        for size in self._sizes(*site.shape):
            cost = quotient_remainder_cost(*site.shape, *size, itemsize=table.dtype.itemsize)
            if cost.params < table.numel():
                costs[size] = cost
        if self.start == "random":
            errors = [total * (1 - cost.params / table.numel()) for cost in costs.values()]
        else:
            numbers = [cost.params for cost in costs.values()]
            errors = _between(numbers, list(costs), partial(self._error, site.module))
        options = [
            Option(self.name, size, self.own_form, cost, error)
            for (size, cost), error in zip(costs.items(), errors, strict=True)
        ]
        front = pareto_front(site, options)
        return Curve(site.names, front, total, None, "weight", exact=False)

    def _error(self, module: nn.Module, size: Size) -> float:
        """Squared, of the nearest tables of this size."""
        table = layouts.matrix(module).detach()
        found = linalg.two_tables(table, size[0], self.op, size[1])
        whole = _layer(module, *found, self.op).dense_weight(torch.float64)
        return float((table.double() - whole.detach()).square().sum())

    def _sizes(self, rows: int, columns: int) -> Iterator[Size]:
        """From the fewest rows on, about evenly in the logarithm."""
        width = columns // 2 if self.op == "concat" else columns
        remainders = math.isqrt(rows - 1) + 1
        while width and remainders < rows:
            yield remainders, width
            remainders += max(1, int(STEP * remainders))

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        table = layouts.matrix(module).detach()
        remainders, width = sizes_of(option, module, "remainders, width")
        rows, columns = table.shape
        split = self.op == "concat"
        if remainders > rows or not (width < columns if split else width == columns):
            raise LowrankError(
                f"expected a size (remainders up to {rows}, width "
                f"{'below' if split else 'of'} {columns}) for op {self.op!r}, got {option.size}"
            )
        check_padding(module, "two tables")
        if self.start == "nearest":
            quotient, remainder = linalg.two_tables(table, remainders, self.op, width)
        else:
            quotient, remainder = self._drawn(table, remainders, width)
        return _layer(module, quotient.to(table), remainder.to(table), self.op)

    def _drawn(self, table: Tensor, remainders: int, width: int) -> tuple[Tensor, Tensor]:
        """Q and R whose rows have the scale of the table's."""
        rng = torch.Generator().manual_seed(self.seed ^ fingerprint(table))
        left = table.shape[1] - (width if self.op == "concat" else 0)
        shapes = (-(-len(table) // remainders), left), (remainders, width)
        quotient, remainder = (torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes)
        scale = float(table.double().square().mean().sqrt())
        if self.op == "mult":  # the shorter around one, or training is slow to move the longer
            if len(quotient) <= len(remainder):
                return (1 + quotient / 2) / 1.25**0.5, remainder * scale
            return quotient * scale, (1 + remainder / 2) / 1.25**0.5
        scale *= 1 if self.op == "concat" else 0.5**0.5
        return quotient * scale, remainder * scale


def _between(
    numbers: Sequence[int], sizes: Sequence[Size], error_of: Callable[[Size], float]
) -> list[float]:
    """The error of every size; of many, interpolated in their numbers between a few."""
    if len(sizes) <= FEW:
        return [error_of(size) for size in sizes]
    last = len(sizes) - 1
    anchors = [round(last * step / (ANCHORS - 1)) for step in range(ANCHORS)]
    known = [error_of(sizes[place]) for place in anchors]
    found: list[float] = np.interp(numbers, [numbers[place] for place in anchors], known).tolist()
    return found


def _layer(
    module: nn.Module, quotient: Tensor, remainder: Tensor, op: str
) -> QuotientRemainderEmbedding:
    return QuotientRemainderEmbedding.from_tables(quotient, remainder, module, op)
