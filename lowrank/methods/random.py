"""Random factors, for training a model that is factored by design (Greenformer, arXiv 2109.06762).

The trained weight is discarded, its scale kept: entries of up·down have the variance of W's. The
bias is kept too. Never a default.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import low_rank_curve, low_rank_layer, rank_of


@dataclass(frozen=True)
class Random:
    """Options: `seed`; layers with different weights get different numbers from one seed.

    The curve is a bound, not exact: the mean error of W projected on a random subspace of that
    rank, ‖W‖²(1 − r / min(out, in)), which training one factor could reach.
    """

    seed: int = 0
    kinds = frozenset({"linear", "conv"})
    needs = frozenset[str]()

    def curve(self, site: Site, stats: Statistics) -> Curve:
        total = float(layouts.matrix(site.module).detach().double().square().sum())
        side = min(site.shape)
        errors = [total * (1 - rank / side) for rank in range(side + 1)]
        return low_rank_curve(site, "random", errors, spectrum=None, norm="weight", exact=False)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight, rank = layouts.matrix(module).detach(), rank_of(option, module)
        generator = torch.Generator().manual_seed(self.seed ^ fingerprint(weight))
        # Var(Σ_r up·down) = r · std⁴ has to equal the mean square of W.
        std = (float(weight.double().square().mean()) / rank) ** 0.25
        up, down = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device)
            for shape in ((weight.shape[0], rank), (rank, weight.shape[1]))
        )
        # For a zero weight one factor stays non-zero: else no gradient could reach them.
        down = down * (std or weight.shape[1] ** -0.5)
        return low_rank_layer(module, down, up * std, option)


def fingerprint(weight: Tensor) -> int:
    """A number of its entries, so that layers draw apart from each other by one seed."""
    return zlib.crc32(weight.float().cpu().contiguous().numpy().tobytes())
