"""A small dense basis, and few coefficients in every row: W ≈ C · D (DSFormer, arXiv 2312.13211).

min E‖(W − C D) x‖² over D with r rows and C with exactly s non-zeros in each row: in n r + m s
numbers a union of subspaces, where low rank in r (m + n) has but one. DSFormer starts without data
and refines C while it fine-tunes; of it only the abstract was at hand. This is the start alone,
aware of data and by our own numerics (linalg/sparse.py), with one basis for the whole matrix.
Every coefficient also stores a one- or two-byte index, which counts in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .. import layouts, linalg
from ..errors import LowrankError
from ..linalg.sparse import SWEEPS
from ..nn import DenseSparseLinear, dense_sparse_cost
from ..nn.dense_sparse import MOST
from ..types import Curve, Option, Site, Size, Statistics
from .common import gram_of
from .sampled import sampled_curve, sizes_of

DENSITY = 0.3  # benchmarks/sparse_quality.py --density compares


@dataclass(frozen=True)
class DenseSparse:
    """Options: `density`, the share s / r of atoms that every row uses, in (0, 1]; `sweeps` of the
    alternation; `seed` of atoms that are drawn.

    Sizes are (r, s), r up to the number of outputs. The curve is an interpolation, not exact: see
    `sampled_curve`; where there are few sizes all of their errors are computed.
    """

    seed: int = 0
    density: float = DENSITY
    sweeps: int = SWEEPS
    kinds = frozenset({"linear"})
    needs = frozenset({"gram"})
    own_form = True

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise LowrankError(f"density must be in (0, 1], got {self.density}")
        if not isinstance(self.sweeps, int) or self.sweeps < 0:
            raise LowrankError(f"sweeps must be an integer >= 0, got {self.sweeps!r}")

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weight, gram = layouts.matrix(site.module), gram_of(stats, site.shape[1])
        total = linalg.squared_error(weight, torch.zeros_like(weight), gram)

        def error(size: Size, share: float) -> float:
            sweeps = math.ceil(share * self.sweeps)
            rank, count = size
            code = linalg.dense_sparse(weight, rank, count, gram, sweeps=sweeps, seed=self.seed)
            return linalg.squared_error(weight, code.coefficients() @ code.basis, gram)

        cost = partial(dense_sparse_cost, *site.shape, itemsize=weight.dtype.itemsize)
        sizes = ((rank, self._count(rank)) for rank in range(1, min(site.shape[0], MOST) + 1))
        return sampled_curve(site, "dense-sparse", sizes, cost, error, total)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight = layouts.matrix(module)
        rank, count = sizes_of(option, module, "atoms, coefficients in a row")
        if count > rank or rank > MOST:
            raise LowrankError(
                f"{count} coefficients a row need as many atoms, at most {MOST}; got {option.size}"
            )
        code = linalg.dense_sparse(
            weight, rank, count, gram_of(stats, weight.shape[1]), sweeps=self.sweeps,
            seed=self.seed,
        )  # fmt: skip
        parts = code.basis.to(weight), code.value.to(weight), code.atoms
        return DenseSparseLinear.from_code(*parts, layouts.bias(module))

    def _count(self, rank: int) -> int:
        return max(1, round(self.density * rank))
