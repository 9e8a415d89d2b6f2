"""Plain truncated SVD: the nearest matrix of a given rank.

min ‖W − up·down‖_F over rank r; the error is Σ_{j>r} σ_j² (Eckart and Young 1936). Data-free.
Embeddings are projected in the space of their columns, so that a zero row (padding) stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import linalg
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import low_rank_curve, low_rank_layer, rank_of, table_layer


@dataclass(frozen=True)
class SVD:
    """Options: `seed` of the randomised SVD that very large matrices use at small ranks."""

    seed: int = 0
    kinds = frozenset({"linear", "conv", "embedding"})
    needs = frozenset[str]()
    nested = True

    def curve(self, site: Site, stats: Statistics) -> Curve:
        energy = linalg.energies(layouts.matrix(site.module))
        return low_rank_curve(
            site,
            "svd",
            linalg.tails(energy).tolist(),
            spectrum=energy.sqrt().cpu(),
            norm="weight",
            exact=True,
        )

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        if layouts.kind(module) == "embedding":
            table = layouts.matrix(module)
            return table_layer(module, *linalg.factor_tokens(table, rank_of(option, module)))
        up, down = linalg.factor(layouts.matrix(module), rank_of(option, module), seed=self.seed)
        return low_rank_layer(module, down, up, option)
