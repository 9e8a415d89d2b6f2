"""A dense basis with sparse coefficients: few in every row, W ≈ C · D, or in every column of W.

The form of DSFormer (arXiv 2312.13211): n r + m s numbers, D with r rows and C with exactly s
non-zeros per row, a union of subspaces where low rank has only one. DSFormer starts without data
and refines C in fine-tuning; ours is the start alone, data-aware, with our own numerics
(linalg/sparse.py) and one basis for the whole matrix. By columns, W ≈ (C · D)ᵀ, the basis is one of
the outputs: it costs less where they are fewer than the inputs. Every coefficient also stores a
one- or two-byte index, which counts in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError, unknown
from ..linalg.sparse import ITERATIONS, Side
from ..nn import DenseSparseLinear, SparseDenseLinear, dense_sparse_cost, sparse_dense_cost
from ..nn.dense_sparse import MOST
from ..types import Curve, Option, Site, Size, Statistics
from ..walk import layouts
from .common import gram_of
from .sampled import pareto_front, sampled_curve, sizes_of

DENSITY = 0.2  # benchmarks/sparse_quality.py --density compares
NAME = "dense-sparse"
STORAGE: dict[Side, str] = {"out": NAME, "in": "sparse-dense"}
COST = {"out": dense_sparse_cost, "in": sparse_dense_cost}


@dataclass(frozen=True)
class DenseSparse:
    """Options: `density`, the share s / r of atoms that every row uses, in (0, 1]; `side`, "out"
    for s coefficients in every row of W, "in" for every column, or "best", the better one for each
    site; `iterations` of the solver; `seed` of random atoms.

    Sizes are (r, s), r up to the number of outputs (by columns: of inputs); the storage tells the
    side. The curve is an interpolation, not exact: see `sampled_curve`.
    """

    seed: int = 0
    density: float = DENSITY
    side: Side | Literal["best"] = "best"
    iterations: int = ITERATIONS
    kinds = frozenset({"linear"})
    needs = frozenset({"gram"})
    own_form = NAME

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise LowrankError(f"density must be in (0, 1], got {self.density}")
        if self.side not in (known := ("best", *get_args(Side))):
            raise unknown("side", str(self.side), known)
        if not isinstance(self.iterations, int) or self.iterations < 0:
            raise LowrankError(f"iterations must be an integer >= 0, got {self.iterations!r}")

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weight, gram = layouts.matrix(site.module), gram_of(stats, site.shape[1])
        total = linalg.squared_error(weight, torch.zeros_like(weight), gram)
        sides: tuple[Side, ...] = get_args(Side) if self.side == "best" else (self.side,)
        options = [
            option
            for side in sides
            for option in self._curve(site, weight, gram, total, side).options
            if not option.dense
        ]
        return Curve(site.names, pareto_front(site, options), total, None, "output", exact=False)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight = layouts.matrix(module)
        rank, count = sizes_of(option, module, "atoms, coefficients per row")
        if count > rank or rank > MOST:
            raise LowrankError(
                f"{count} coefficients per row need as many atoms, at most {MOST}; got "
                f"{option.size}"
            )
        side: Side = "in" if option.storage == STORAGE["in"] else "out"
        gram = gram_of(stats, weight.shape[1])
        code = self._code(weight, (rank, count), gram, side, self.iterations)
        basis, value = code.basis.to(weight), code.value.to(weight)
        bias = layouts.bias(module)
        if side == "in":
            return SparseDenseLinear.from_code(basis.T, value, code.atoms, bias)
        return DenseSparseLinear.from_code(basis, value, code.atoms, bias)

    def _curve(self, site: Site, weight: Tensor, gram: Tensor, total: float, side: Side) -> Curve:
        def error(size: Size, share: float) -> float:
            code = self._code(weight, size, gram, side, math.ceil(share * self.iterations))
            near = code.coefficients() @ code.basis
            return linalg.squared_error(weight, near if side == "out" else near.T, gram)

        cost = partial(COST[side], *site.shape, itemsize=weight.dtype.itemsize)
        most = min(site.shape[side == "in"], MOST)
        sizes = ((rank, max(1, round(self.density * rank))) for rank in range(1, most + 1))
        curve = sampled_curve(site, STORAGE[side], sizes, cost, error, total)
        return replace(curve, options=tuple(replace(o, method=NAME) for o in curve.options))

    def _code(
        self, weight: Tensor, size: Size, gram: Tensor, side: Side, iterations: int
    ) -> linalg.SparseCode:
        rank, count = size
        return linalg.dense_sparse_code(
            weight, rank, count, gram, side=side, iterations=iterations, seed=self.seed
        )
