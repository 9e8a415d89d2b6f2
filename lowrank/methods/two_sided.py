"""Two-sided SVD: the matrix of a given rank that changes the loss least, to second order.

min ‖G^½ (W − Ŵ) H^½‖², H = E[x xᵀ] and G = E[g gᵀ] of the gradients g at the layer's outputs, with
labels drawn from the model itself (the true Fisher). IO-SVD and OBD-LLM; K-FAC's approximation of
the Fisher. G is damped, for it is estimated from few tokens and holds near the dense model only.
Errors are estimates of twice the KL to the dense model, and so compare across layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .. import layouts, linalg
from ..errors import LowrankError
from ..types import Curve, Option, Site, Statistics
from .common import gram_of, low_rank_curve, low_rank_layer, rank_of


@dataclass(frozen=True)
class TwoSided:
    """Options: `damp` of G, a share of its mean diagonal; `seed` of the sketch for large layers."""

    damp: float = linalg.DAMP
    seed: int = 0
    kinds = frozenset({"linear"})
    needs = frozenset({"gram", "out_gram"})

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weighted = self._weighted(layouts.matrix(site.module), stats)
        energy = linalg.energies(weighted, gram_of(stats, site.shape[1]))
        return low_rank_curve(
            site,
            "two-sided",
            linalg.tails(energy).tolist(),
            spectrum=energy.sqrt().cpu(),
            norm="fisher",
            exact=True,
        )

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight, rank = layouts.matrix(module), rank_of(option, module)
        gram = gram_of(stats, weight.shape[1])
        up, down = linalg.factor(self._weighted(weight, stats), rank, gram, seed=self.seed)
        root = linalg.output_root(out_gram_of(stats, weight.shape[0]), self.damp)
        up, down = linalg.balance(linalg.unrooted(root, up), down)
        return low_rank_layer(module, down, up, option)

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float:
        """‖G^½ (W − Ŵ) H^½‖² of any Ŵ (out, in), in the norm of the curve."""
        off = layouts.matrix(module).detach().double() - weight.detach().double()
        root = linalg.output_root(out_gram_of(stats, off.shape[0]), self.damp)
        return linalg.squared_error(root @ off, off.new_zeros(()), gram_of(stats, off.shape[1]))

    def _weighted(self, weight: Tensor, stats: Statistics) -> Tensor:
        """S W (out, in), float64."""
        root = linalg.output_root(out_gram_of(stats, weight.shape[0]), self.damp)
        weighted: Tensor = root @ weight.detach().double()
        return weighted


def out_gram_of(stats: Statistics, out_features: int) -> Tensor:
    """E[g gᵀ] (out, out).

    Raises:
        LowrankError: it was not gathered, or belongs to a layer of another width.
    """
    shape = None if stats.out_gram is None else tuple(stats.out_gram.shape)
    if stats.out_gram is None or shape != (out_features, out_features):
        raise LowrankError(
            f"expected the gradients' gram of {out_features} outputs, got {shape or 'none'}: "
            "calibrate with fisher=True"
        )
    return stats.out_gram
