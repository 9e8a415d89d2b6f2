"""Low rank plus a few full input channels: W ≈ L + S, S with columns at c inputs.

LOST (arXiv 2508.02668) trains such layers from scratch, OATS (arXiv 2409.13652) alternates between
low rank and sparse. Here both parts are fitted to the outputs, min E‖(W − L − S) x‖²: low rank fits
outlier inputs worst, and each of them costs only m numbers. The channels are those that reduce the
whole tail most; low rank and channels are refined in turn (linalg/lowrank_sparse.py). Unlike in
LOST's related code the columns hold the residual, not W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError
from ..linalg.lowrank_sparse import ROUNDS
from ..linalg.svd import compute_dtype
from ..nn import LowRankSparseLinear, low_rank_sparse_cost
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import gram_of
from .sampled import pareto_front, sizes_of

SHARES = (0.01, 0.03, 0.1)  # LOST's δ is in this range


@dataclass(frozen=True)
class LowRankSparse:
    """Options: `shares` of the inputs that may be kept in full, each in (0, 1), at least one
    input; `rounds` of refinement; `seed` as for `SVD`.

    Sizes are (r, c). The curve is a bound, not exact: channels are those of the tails of ranks 1,
    2, 4, …, without refinement.
    """

    seed: int = 0
    shares: tuple[float, ...] = SHARES
    rounds: int = ROUNDS
    kinds = frozenset({"linear"})
    needs = frozenset({"gram"})
    own_form = "lowrank-sparse"

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise LowrankError(f"shares must be numbers in (0, 1), got {self.shares!r}")
        if not isinstance(self.rounds, int) or self.rounds < 0:
            raise LowrankError(f"rounds must be an integer >= 0, got {self.rounds!r}")

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weight, gram = layouts.matrix(site.module), gram_of(stats, site.shape[1])
        total = linalg.squared_error(weight, torch.zeros_like(weight), gram)
        counts = sorted({max(1, round(share * site.shape[1])) for share in self.shares})
        options = []
        for count, errors in _errors(weight, counts, gram, self.seed).items():
            for rank, error in enumerate(errors, start=1):
                cost = low_rank_sparse_cost(
                    *site.shape, rank, count, itemsize=weight.dtype.itemsize
                )
                error = min(error, total)
                size = rank, count
                options.append(Option("lowrank-sparse", size, "lowrank-sparse", cost, error))
        return Curve(site.names, pareto_front(site, options), total, None, "output", exact=False)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight = layouts.matrix(module)
        rank, count = sizes_of(option, module, "rank, channels")
        if rank > min(weight.shape) or count > weight.shape[1]:
            raise LowrankError(
                f"a size ({rank}, {count}) needs a rank up to {min(weight.shape)} and "
                f"{weight.shape[1]} inputs or fewer"
            )
        parts = linalg.low_rank_sparse(
            weight, rank, count, gram_of(stats, weight.shape[1]), rounds=self.rounds,
            seed=self.seed,
        )  # fmt: skip
        down, up, columns = (part.to(weight) for part in (parts.down, parts.up, parts.columns))
        return LowRankSparseLinear.from_parts(down, up, columns, parts.inputs, layouts.bias(module))


def _errors(weight: Tensor, counts: list[int], gram: Tensor, seed: int) -> dict[int, list[float]]:
    """Errors of ranks 1…min(out, in) by the number of channels, which are chosen for the tail."""
    gram = linalg.steady(gram)
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    side = min(matrix.shape)
    basis = linalg.output_basis(matrix, side, gram, seed=seed)
    errors: dict[int, list[float]] = {count: [] for count in counts}
    step = 1
    while step <= side:
        part = basis[:, :step]
        order = linalg.channels(matrix - part @ (part.T @ matrix), counts[-1], gram)
        for count in counts:
            rest = linalg.remaining(gram, order[:count], matrix)
            tails = linalg.tails(linalg.carried(matrix, basis, rest)).tolist()
            errors[count] += tails[step : min(2 * step, side + 1)]
        step *= 2
    return errors
