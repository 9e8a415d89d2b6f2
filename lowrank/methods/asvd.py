"""ASVD: SVD of the weight with its columns scaled by the size of their inputs.

W S with S = diag(E[x²]^(α/2)), α = 0.5 (Yuan et al., arXiv 2312.05821, who take mean |x|); the best
rank-r approximation of W S is U_r U_rᵀ W S, so that Ŵ = U_r U_rᵀ W and S is never inverted: an
input that is always zero needs no floor. Unlike in the authors' code the decomposition is exact,
and the curve is that of the output error, ‖(W − Ŵ) H^½‖² = Σ_{j>r} u_jᵀ W H Wᵀ u_j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import gram_of, low_rank_curve, low_rank_layer, rank_of


@dataclass(frozen=True)
class ASVD:
    """Options: `alpha`, the power of the input's size, in [0, 1], 0 is plain SVD; `seed` of the
    randomised SVD that very large matrices use at small ranks.

    The spectrum is the root of each output direction's energy, in descending order.
    """

    seed: int = 0
    alpha: float = 0.5
    kinds = frozenset({"linear", "conv"})
    needs = frozenset({"gram"})
    nested = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise LowrankError(f"alpha must be in [0, 1], got {self.alpha}")

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weight, gram = layouts.matrix(site.module), gram_of(stats, site.shape[1])
        basis = linalg.output_basis(weight, min(weight.shape), self._metric(gram))
        parts = linalg.carried(weight, basis, gram)
        return low_rank_curve(
            site,
            "asvd",
            linalg.tails(parts).tolist(),
            spectrum=parts.sqrt().sort(descending=True).values.cpu(),
            norm="output",
            exact=True,
        )

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight, rank = layouts.matrix(module), rank_of(option, module)
        metric = self._metric(gram_of(stats, weight.shape[1]))
        up, down = linalg.factor(weight, rank, metric, seed=self.seed)
        return low_rank_layer(module, down, up, option)

    def _metric(self, gram: Tensor) -> Tensor:
        """S² as a metric (in, in)."""
        return torch.diag(gram.diagonal().clamp(min=0) ** self.alpha)
