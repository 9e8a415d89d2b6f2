"""Generalized Nyström: low rank from two random sketches of the weight, and no SVD.

Ŵ = W X (Yᵀ W X)⁺ Yᵀ W with Gaussian X and Y (Nakatsukasa, arXiv 2009.11392, in its stable form;
as a meta-factorization arXiv 2105.10278); for `whitened-nystrom` X is drawn with covariance
E[x xᵀ], as inputs are. Never nearer than `svd` or `whitened` of equal rank. Unlike in the paper one
pair of sketches serves all ranks of a weight: what it gives is truncated, and scaled component by
component to be nearest (linalg/nystrom.py). So the curve is exact, its errors fall at every rank,
and the factors of a rank are the leading ones of a larger rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import factored_cost, gram_of, low_rank_layer, options_of, rank_of


@dataclass(frozen=True)
class Nystrom:
    """Options: `seed` of X and Y; `oversample`, by which share of X's columns Y has more.

    X has as many columns as the largest rank whose factors are smaller than the dense weight. Of
    higher ranks, which pivoted storage has for other methods, nothing is known.
    """

    seed: int = 0
    oversample: float = 0.5
    kinds = frozenset({"linear", "conv"})
    needs = frozenset[str]()
    nested = True
    name = "nystrom"

    def __post_init__(self) -> None:
        if not 0 <= self.oversample < math.inf:
            raise LowrankError(f"oversample must be a number >= 0, got {self.oversample!r}")

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weight = layouts.matrix(site.module)
        up, down = self._factors(weight, 1, stats)
        errors = linalg.leading_errors(weight, up, down, self._gram(weight, stats)).tolist()
        ranks, cost = list(enumerate(errors))[1:], partial(factored_cost, site)
        options = options_of(site, self.name, "factors", ranks, cost)
        norm = "output" if self.needs else "weight"
        return Curve(site.names, options, errors[0], None, norm, exact=True)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        rank = rank_of(option, module)
        up, down = self._factors(layouts.matrix(module), rank, stats)
        return low_rank_layer(module, down[:rank], up[:, :rank], option)

    def _factors(self, weight: Tensor, rank: int, stats: Statistics) -> tuple[Tensor, Tensor]:
        """Of the largest rank that saves anything, or of `rank` if that is larger."""
        rank = max(rank, (weight.numel() - 1) // sum(weight.shape))
        more, gram = math.ceil(self.oversample * rank), self._gram(weight, stats)
        factors = linalg.generalized_nystrom(weight, rank, gram, oversample=more, seed=self.seed)
        return linalg.ordered(weight, *factors, gram)

    def _gram(self, weight: Tensor, stats: Statistics) -> Tensor | None:
        return gram_of(stats, weight.shape[1]) if self.needs else None


@dataclass(frozen=True)
class WhitenedNystrom(Nystrom):
    """Generalized Nyström by output error.

    Options: as for `Nystrom`.
    """

    needs = frozenset({"gram"})
    name = "whitened-nystrom"
