"""Two-sided SVD: the matrix of a given rank that changes the loss least, to second order.

min ‖G^½ (W − Ŵ) H^½‖², H = E[x xᵀ] and G = E[g gᵀ] of the gradients g at the layer's outputs, with
labels sampled from the model (the true Fisher). IO-SVD and OBD-LLM; K-FAC's approximation of the
Fisher. G is damped, since it is estimated from few tokens and holds only near the dense model.
Errors estimate twice the KL to the dense model, and so are comparable across layers.

`two-sided-…` fit the other forms of convolutions (convolution.py) in the same metric. `two-sided`
delegates convolutions to `two-sided-conv`, which chooses the best form for each, and embeddings to
`head-aware`. `two-sided-stored` has to be named: it may take a form that is never faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError
from ..linalg.gram import full_precision
from ..types import Curve, Method, Option, Site, Statistics, Unit
from ..walk import layouts
from .common import gram_of, low_rank_curve, low_rank_layer, out_gram_of, rank_of
from .conv_forms import Metric
from .convolution import JOINED, STORED, STORING, Tucker
from .head_aware import HeadAware


@dataclass(frozen=True)
class TwoSided:
    """Options: `damp` of G, relative to its mean diagonal; `seed` of the randomised SVD."""

    damp: float = linalg.DAMP
    seed: int = 0
    kinds = frozenset({"linear", "conv"})
    needs = frozenset({"gram", "out_gram"})
    nested = True

    def __post_init__(self) -> None:
        if not 0 < self.damp < math.inf:
            raise LowrankError(f"damp must be a finite number above 0, got {self.damp}")

    def for_kind(self, kind: str) -> Method:
        if kind == "conv":
            return TwoSidedConv(seed=self.seed, damp=self.damp)
        return HeadAware(self.seed) if kind == "embedding" else self

    def curve(self, site: Site, stats: Statistics) -> Curve:
        root, gram = self._root(stats, site.shape[0]), gram_of(stats, site.shape[1])
        energy = linalg.energies(_rooted(root, layouts.matrix(site.module)), gram)
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
        root, gram = self._root(stats, weight.shape[0]), gram_of(stats, weight.shape[1])
        up, down = linalg.factor(_rooted(root, weight), rank, gram, seed=self.seed)
        up, down = linalg.balance(linalg.unrooted(root, up), down)
        return low_rank_layer(module, down, up, option)

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float:
        """‖G^½ (W − Ŵ) H^½‖² of any Ŵ (out, in), in the norm of the curve."""
        diff = layouts.matrix(module).detach().double() - weight.detach().double()
        root, gram = self._root(stats, diff.shape[0]), gram_of(stats, diff.shape[1])
        return linalg.squared_error(_rooted(root, diff), diff.new_zeros(()), gram)

    def output_metric(self, stats: Statistics) -> Tensor | None:
        """S with SᵀS = G, damped; None without gradients."""
        return None if stats.out_gram is None else linalg.output_root(stats.out_gram, self.damp)

    def _root(self, stats: Statistics, out_features: int) -> Tensor:
        return linalg.output_root(out_gram_of(stats, out_features), self.damp)


def _rooted(root: Tensor, weight: Tensor) -> Tensor:
    """S W (out, in), float64."""
    with full_precision(weight):
        return root @ weight.detach().to(root)


@dataclass(frozen=True)
class TwoSidedTucker(Tucker):
    """Convolutions: Tucker-2 or channel factors, by estimated effect on predictions.

    Options: `damp` as for `TwoSided`, `seed`.
    """

    damp: float = linalg.DAMP
    name = "two-sided-tucker"
    needs = frozenset({"gram", "out_gram"})

    def output_metric(self, stats: Statistics) -> Tensor | None:
        return TwoSided(self.damp, self.seed).output_metric(stats)

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float:
        return TwoSided(self.damp, self.seed).error(module, weight, stats)

    def _channels(self) -> Method:
        return TwoSided(self.damp, self.seed)

    def _metric(self, module: nn.Module, stats: Statistics) -> Metric:
        outputs, inputs = layouts.matrix(module).shape
        root = linalg.output_root(out_gram_of(stats, outputs), self.damp)
        return Metric(gram_of(stats, inputs), root)


@dataclass(frozen=True)
class TwoSidedConv(TwoSidedTucker):
    """Convolutions: best of Tucker-2, k×1 then 1×k, channel factors, by effect on predictions.

    Options: `damp` as for `TwoSided`, `seed`.
    """

    forms = JOINED
    name = "two-sided-conv"


@dataclass(frozen=True)
class TwoSidedStored(TwoSidedTucker):
    """`two-sided`, and for convolutions low rank at every frequency too, which saves storage and no
    products (`Tubal`): the best form for each, by estimated effect on predictions.

    Options: `damp` as for `TwoSided`, `seed`.
    """

    forms = STORING
    name = "two-sided-stored"
    kinds = TwoSided.kinds
    units: ClassVar[frozenset[Unit]] = STORED

    def for_kind(self, kind: str) -> Method:
        return self if kind == "conv" else TwoSided(self.damp, self.seed).for_kind(kind)
