"""FWSVD: plain SVD with every row weighted by its Fisher information (arXiv 2207.00112).

min ‖D^½ (W − up·down)‖_F with D = diag of the rows' importance: their squared gradients, summed
over the row. A baseline: it ignores the inputs. The authors scale the left factor of the SVD of
D^½ W back by D^{-½}; that is Ŵ = W V_r V_rᵀ, V the right singular vectors of D^½ W. We use this
form: nothing is divided, and rows without any gradient need no floor. The authors use the labels of
the task, ours are sampled from the model (the true Fisher).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .. import linalg
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import low_rank_curve, low_rank_layer, rank_of, row_fisher_of


@dataclass(frozen=True)
class FWSVD:
    """Options: `seed` of the randomised SVD that very large matrices use at small ranks."""

    seed: int = 0
    kinds = frozenset({"linear", "conv"})
    needs = frozenset({"row_fisher"})
    nested = True

    def curve(self, site: Site, stats: Statistics) -> Curve:
        rows = row_fisher_of(stats, site.shape[0])
        energy = linalg.energies(layouts.matrix(site.module).T, rows)
        return low_rank_curve(
            site,
            "fwsvd",
            linalg.tails(energy).tolist(),
            spectrum=energy.sqrt().cpu(),
            norm="row-fisher",
            exact=True,
        )

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight, rank = layouts.matrix(module), rank_of(option, module)
        rows = row_fisher_of(stats, weight.shape[0])
        down, up = linalg.factor(weight.T, rank, rows, seed=self.seed)
        return low_rank_layer(module, down.T, up.T, option)

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float:
        """‖D^½ (W − Ŵ)‖² of any Ŵ (out, in), in the norm of the curve."""
        diff = layouts.matrix(module).detach().double() - weight.detach().double()
        return float((row_fisher_of(stats, len(diff)).to(diff) * diff.square().sum(1)).sum())
