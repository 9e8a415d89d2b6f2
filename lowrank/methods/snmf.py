"""Semi-NMF: W ≈ up · down with up ≥ 0, so that outputs are sums of parts (Greenformer's `snmf`).

min ‖W − up·down‖_F, up ≥ 0 (Ding, Li and Jordan, TPAMI 32, 2010); Greenformer (arXiv 2109.06762)
makes the same side non-negative. Unlike in the updates that it calls, the start comes from the SVD
(Gillis and Kumar, arXiv 1410.7220) and bounds the error by the SVD's at one rank less, and the
iteration is deterministic, in float64. None of our dependencies offers it; scikit-learn has only
NMF. See linalg/snmf.py. Plain `svd` is never farther from the weight, and much faster.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import linalg
from ..errors import LowrankError
from ..linalg.snmf import ITERATIONS
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import low_rank_curve, low_rank_layer, rank_of


@dataclass(frozen=True)
class SemiNMF:
    """Options: `iterations`, the maximum number of updates; `seed` as for `SVD`.

    The curve is a lower bound, not exact: the tails of the SVD. From rank two on, the tail of one
    rank less is an upper bound, so that the curve is off by at most one rank.
    """

    seed: int = 0
    iterations: int = ITERATIONS
    kinds = frozenset({"linear", "conv"})
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        if not isinstance(self.iterations, int) or self.iterations < 0:
            raise LowrankError(f"iterations must be an integer >= 0, got {self.iterations!r}")

    def curve(self, site: Site, stats: Statistics) -> Curve:
        energy = linalg.energies(layouts.matrix(site.module))
        return low_rank_curve(
            site,
            "snmf",
            linalg.tails(energy).tolist(),
            spectrum=energy.sqrt().cpu(),
            norm="weight",
            exact=False,
        )

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        rank = rank_of(option, module)
        up, down = linalg.semi_nmf(
            layouts.matrix(module), rank, iterations=self.iterations, seed=self.seed
        )
        return low_rank_layer(module, down, up, option)
