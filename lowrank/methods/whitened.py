"""Activation-aware SVD: the matrix of a given rank whose *outputs* are closest.

min E‖(W − up·down) x‖² = ‖(W − up·down) H^½‖_F², H = E[x xᵀ]; the error is the tail of the
squared singular values of W H^½. SVD-LLM (arXiv 2403.07378), its v2 (arXiv 2503.12340) and
Swift-SVD reach this same optimum; DRONE had it in 2021. Unlike in their code, no Cholesky factor of
H is taken or inverted: Ŵ = U_r U_rᵀ W needs neither (see linalg/svd.py), and input directions that
the calibration never showed are projected like the others.

For convolutions W is the matrix that multiplies patches; `whitened-…` fit the other forms
(convolution.py) in ‖(W − Ŵ)H^½‖, H of the patches. `whitened` delegates convolutions to
`whitened-conv`, which chooses the best form for each, and embeddings to `head-aware`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .. import linalg
from ..types import Curve, Method, Option, Site, Statistics, Unit
from ..walk import layouts
from .common import gram_of, low_rank_curve, low_rank_layer, rank_of
from .conv_forms import Metric
from .convolution import JOINED, STORED, Tucker
from .head_aware import HeadAware


@dataclass(frozen=True)
class Whitened:
    """Options: `seed` of the randomised SVD that very large matrices use at small ranks."""

    seed: int = 0
    kinds = frozenset({"linear", "conv"})
    needs = frozenset({"gram"})
    nested = True

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

    def for_kind(self, kind: str) -> Method:
        if kind == "conv":
            return WhitenedConv(self.seed)
        return HeadAware(self.seed) if kind == "embedding" else self

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight, rank = layouts.matrix(module), rank_of(option, module)
        gram = gram_of(stats, weight.shape[1])
        up, down = linalg.factor(weight, rank, gram, seed=self.seed)
        return low_rank_layer(module, down, up, option)


@dataclass(frozen=True)
class WhitenedTucker(Tucker):
    """Convolutions: Tucker-2 or channel factors, by output error.

    Options: `seed` as for `Whitened`.
    """

    name = "whitened-tucker"
    needs = frozenset({"gram"})

    def _channels(self) -> Method:
        return Whitened(self.seed)

    def _metric(self, module: nn.Module, stats: Statistics) -> Metric:
        return Metric(gram_of(stats, layouts.matrix(module).shape[1]))


@dataclass(frozen=True)
class WhitenedChannel(WhitenedTucker):
    """Convolutions: channel factors, k×k then 1×1 or 1×1 then k×k, by output error.

    Options: `seed` as for `Whitened`.
    """

    forms = ("kernel-last",)
    name = "whitened-channel"


@dataclass(frozen=True)
class WhitenedSpatial(WhitenedTucker):
    """Convolutions: k×1 then 1×k or channel factors, by output error.

    Options: `seed` as for `Whitened`.
    """

    forms = ("spatial",)
    name = "whitened-spatial"


@dataclass(frozen=True)
class WhitenedConv(WhitenedTucker):
    """Convolutions: best of Tucker-2, k×1 then 1×k, and channel factors, by output error.

    Options: `seed` as for `Whitened`.
    """

    forms = JOINED
    name = "whitened-conv"


@dataclass(frozen=True)
class WhitenedTubal(WhitenedTucker):
    """Convolutions: low rank at every frequency of the kernel, or channel factors, by output error.

    Saves storage, not products, as `Tubal`. Options: `seed` as for `Whitened`.
    """

    forms = ("tubal",)
    name = "whitened-tubal"
    own_form: ClassVar[str] = "tubal"
    units: ClassVar[frozenset[Unit]] = STORED
