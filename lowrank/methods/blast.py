"""Blocks that share their bases: W_ij ≈ B_i diag(d_ij) C_j (BLAST, arXiv 2410.21262).

r (m + n + b²) numbers and as many MACs per token: a block matrix with rank up to r in every block
costs about as much as a single rank r. Unlike in the authors' code the columns are scaled by the
size of their inputs, the bases of the outputs are fitted to the outputs at the end, and sides that
b does not divide are padded (linalg/blast.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .. import linalg
from ..errors import LowrankError
from ..linalg.blast import SWEEPS
from ..nn import BlastLinear, blast_cost
from ..types import Curve, Option, Site, Size, Statistics
from ..walk import layouts
from .common import gram_of
from .sampled import sampled_curve, sizes_of

NARROW = 4  # the least width of a block in a curve


@dataclass(frozen=True)
class Blast:
    """Options: `blocks` per side, fewer where a block would be narrower than four; `sweeps` over
    the factors; `seed` of their random start.

    Sizes are (b, r). The curve is an interpolation, not exact: see `sampled_curve`.
    """

    seed: int = 0
    blocks: int = 8
    sweeps: int = SWEEPS
    kinds = frozenset({"linear"})
    needs = frozenset({"gram"})
    own_form = "blast"

    def __post_init__(self) -> None:
        for name in ("blocks", "sweeps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise LowrankError(f"{name} must be an integer >= 1, got {value!r}")

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weight, gram = layouts.matrix(site.module), gram_of(stats, site.shape[1])
        total = linalg.squared_error(weight, torch.zeros_like(weight), gram)
        blocks = max(1, min(self.blocks, min(site.shape) // NARROW))

        def error(size: Size, share: float) -> float:
            sweeps = math.ceil(share * self.sweeps)
            factors = linalg.blast_factors(
                weight, blocks, size[1], gram, sweeps=sweeps, seed=self.seed
            )
            whole = factors.product()[: site.shape[0], : site.shape[1]]
            return linalg.squared_error(weight, whole, gram)

        cost = partial(blast_cost, *site.shape, itemsize=weight.dtype.itemsize)
        sizes = ((blocks, rank) for rank in range(1, min(site.shape) + 1))
        return sampled_curve(site, "blast", sizes, cost, error, total)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight = layouts.matrix(module)
        blocks, rank = sizes_of(option, module, "blocks, rank")
        if blocks > min(weight.shape):
            raise LowrankError(f"{blocks} blocks per side do not fit shape {tuple(weight.shape)}")
        factors = linalg.blast_factors(
            weight, blocks, rank, gram_of(stats, weight.shape[1]), sweeps=self.sweeps,
            seed=self.seed,
        )  # fmt: skip
        left, mix, right = (factor.to(weight) for factor in factors)
        shape = weight.shape[0], weight.shape[1]
        return BlastLinear.from_factors(left, mix, right, layouts.bias(module), shape=shape)
