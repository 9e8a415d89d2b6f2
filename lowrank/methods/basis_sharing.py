"""One input basis for all layers that read one tensor: q, k and v share `down`, gate and up too.

min Σ_i E‖(W_i − U_i D) x‖² is the whitened problem of the stacked rows (linalg/shared.py). At rank
r a group costs r (n + Σ m_i) where separate factors cost Σ_i r_i (n + m_i), so that equal storage
allows a higher rank, and the first product is computed once. Basis Sharing (arXiv 2410.03765) and
D-Rank group layers of one kind across neighbouring blocks; within a block the Gram matrix is
shared, one pass over the data is enough, and grouped-query shapes do no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from .. import linalg
from ..errors import LowrankError
from ..nn import LowRankLinear, SharedLowRankLinear
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import gram_of, low_rank_curve, stacked


@dataclass(frozen=True)
class BasisSharing:
    """Options: `seed` of the randomised SVD that very large matrices use at small ranks."""

    seed: int = 0
    kinds = frozenset({"linear"})
    needs = frozenset({"gram"})
    alone = "whitened"

    def curve(self, sites: Sequence[Site], stats: Statistics) -> Curve:
        gram = gram_of(stats, sites[0].shape[1])
        energy = linalg.shared_energies([layouts.matrix(s.module) for s in sites], gram)
        curve = low_rank_curve(
            stacked(sites),
            "basis-sharing",
            linalg.tails(energy).tolist(),
            spectrum=energy.sqrt().cpu(),
            norm="output",
            exact=True,
        )
        shared = (replace(o, storage="shared") for o in curve.options if not o.dense)
        return replace(curve, options=(*shared, curve.dense))

    def factor(
        self, modules: Sequence[nn.Module], option: Option, stats: Statistics
    ) -> list[nn.Module]:
        weights = [layouts.matrix(module) for module in modules]
        rank = _rank_of(option, sum(map(len, weights)), weights[0].shape[1])
        gram = gram_of(stats, weights[0].shape[1])
        ups, down = linalg.factor_shared(weights, rank, gram, seed=self.seed)
        factors = (down.to(weights[0]), ups[0].to(weights[0]))
        owner = LowRankLinear.from_factors(*factors, layouts.bias(modules[0]))
        others = [
            SharedLowRankLinear.from_factors(owner, up.to(weight), layouts.bias(module))
            for module, weight, up in zip(modules[1:], weights[1:], ups[1:], strict=True)
        ]
        return [owner, *others]


def _rank_of(option: Option, rows: int, columns: int) -> int:
    most = min(rows, columns)
    if option.size is None or len(option.size) != 1 or not 1 <= option.size[0] <= most:
        raise LowrankError(
            f"rank must be in [1, {most}] for stacked rows of shape ({rows}, {columns}), "
            f"got {option.size}"
        )
    return option.size[0]
