"""A table as a tensor train (TT-Rec, arXiv 2101.11714; arXiv 1901.10787): see nn/tensor_train.py.

Both ranks are R, as far as the cores have it. Cores are fitted to a trained table by TT-SVD
(linalg/tensor_train.py), which keeps little where the order of the rows means nothing: of a table
of matrix rank 4 with 1000 rows of 16, which low rank stores exactly in 4,064 numbers, it misses
0.625 of the norm with 6,080. So it is for training, from the start or on from there, and for tables
of so many rows that low rank ends at rank one.

Drawn cores have one standard deviation, (σ² / R₁R₂)^⅙ for a table of σ. In Hetu's code it is that
of a table of variance 3/V at every path of the ranks, where (3V)⁻¹ in all was meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError, unknown
from ..nn import TensorTrainEmbedding, tensor_train_cost
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import check_padding, refuse_head
from .random import fingerprint
from .sampled import pareto_front, sizes_of

STARTS = ("nearest", "random")
STEP = 0.03  # between ranks


@dataclass(frozen=True)
class TensorTrain:
    """Options: `start`: the "nearest" cores, by TT-SVD, or "random" ones of the table's scale,
    drawn by `seed`, for training from nothing.

    Sizes are (R₁, R₂). The curve is a bound, for it counts the rows that only fill up; of random
    cores it has the share of the numbers that is left out.
    """

    seed: int = 0
    start: str = "nearest"
    kinds = frozenset({"embedding"})
    needs = frozenset[str]()
    own_form = "tensor-train"

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise unknown("start", str(self.start), STARTS)

    def curve(self, site: Site, stats: Statistics) -> Curve:
        refuse_head(site, "a tensor train")
        check_padding(site.module, "a tensor train")
        table = _table(site.module)
        total = float(layouts.matrix(site.module).detach().double().square().sum())
        lost = max(total - float(table.double().square().sum()), 0.0)  # a padding row of a bag
        sides, costs = _sides(table), {}
        for size in _sizes(*sides):
            cost = tensor_train_cost(*sides, *size, itemsize=table.dtype.itemsize)
            if cost.params >= table.numel():
                break
            costs[size] = cost
        if self.start == "random":
            errors = [total * (1 - cost.params / table.numel()) for cost in costs.values()]
        else:
            errors = [lost + error for error in linalg.tt_errors(table, *sides, costs)]
        options = [
            Option("tensor-train", size, "tensor-train", cost, min(error, total))
            for (size, cost), error in zip(costs.items(), errors, strict=True)
        ]
        front = pareto_front(site, options)
        return Curve(site.names, front, total, None, "weight", exact=False)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        table = _table(module)
        ranks, sides = sizes_of(option, module, "left rank, right rank"), _sides(table)
        most = linalg.most_ranks(*sides)
        if ranks[0] > most[0] or ranks[1] > most[1]:
            raise LowrankError(
                f"expected ranks of at most {most} for shape {tuple(table.shape)}, got {ranks}"
            )
        check_padding(module, "a tensor train")
        if self.start == "nearest":
            cores = linalg.tt_cores(table, *sides, ranks)
        else:
            cores = self._drawn(table, *sides, ranks)
        first, middle, last = (core.to(table) for core in cores)
        return TensorTrainEmbedding.from_cores(first, middle, last, module)

    def _drawn(
        self, table: Tensor, rows: linalg.Sides, columns: linalg.Sides, ranks: linalg.Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        rng = torch.Generator().manual_seed(self.seed ^ fingerprint(table))
        variance = float(table.double().square().mean())
        scale = ((variance or 1.0) / (ranks[0] * ranks[1])) ** (1 / 6)
        (n1, n2, n3), (d1, d2, d3) = rows, columns
        left, right = ranks
        shapes = (n1, d1, left), (n2, left, d2, right), (n3, right, d3)
        first, middle, last = (
            torch.randn(shape, generator=rng, dtype=torch.float64) * scale for shape in shapes
        )
        return first, middle * bool(variance), last  # all three zero would get no gradient


def _table(module: nn.Module) -> Tensor:
    """The table (V, D), with zeros for padding."""
    table, padding = layouts.matrix(module).detach(), module.padding_idx
    if padding is None or not bool(table[padding].any()):  # type: ignore[index]
        return table
    table = table.clone()
    table[padding] = 0  # type: ignore[index]
    return table


def _sides(table: Tensor) -> tuple[linalg.Sides, linalg.Sides]:
    return linalg.row_sides(table.shape[0]), linalg.column_sides(table.shape[1])


def _sizes(rows: linalg.Sides, columns: linalg.Sides) -> Iterator[linalg.Ranks]:
    """Both ranks rise together, about evenly in the logarithm, as far as the cores have them."""
    left, right = linalg.most_ranks(rows, columns)
    rank = 1
    while rank < max(left, right):
        yield min(rank, left), min(rank, right)
        rank += max(1, int(STEP * rank))
    yield left, right
