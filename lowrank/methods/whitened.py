"""Activation-aware SVD: the matrix of a given rank whose *outputs* are nearest.

min E‖(W − up·down) x‖² = ‖(W − up·down) H^½‖_F², H = E[x xᵀ]; the error is the tail of the
squared singular values of W H^½. SVD-LLM (arXiv 2403.07378), its v2 (arXiv 2503.12340) and
Swift-SVD reach this same optimum; DRONE had it in 2021. Unlike their code we neither take a
Cholesky factor of H nor invert one: Ŵ = U_r U_rᵀ W needs neither (see linalg/svd.py), and
directions that the calibration never showed are treated as the output basis treats the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import linalg
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import gram_of, low_rank_curve, low_rank_layer, rank_of


@dataclass(frozen=True)
class Whitened:
    """Options: `seed` of the sketch that very large matrices use at small ranks."""

    seed: int = 0
    kinds = frozenset({"linear", "conv"})
    needs = frozenset({"gram"})

    def curve(self, site: Site, stats: Statistics) -> Curve:
        gram = gram_of(stats, site.shape[1])
        energy = linalg.energies(layouts.matrix(site.module), gram)
        return low_rank_curve(
            site,
            "whitened",
            linalg.tails(energy).tolist(),
            spectrum=energy.sqrt().cpu(),
            norm="output",
            exact=True,
        )

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight, rank = layouts.matrix(module), rank_of(option, module)
        gram = gram_of(stats, weight.shape[1])
        up, down = linalg.factor(weight, rank, gram, seed=self.seed)
        return low_rank_layer(module, down, up, option)
