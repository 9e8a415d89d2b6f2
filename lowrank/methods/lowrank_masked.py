"""Low rank plus sparse: W ≈ L + S, with S zero off a mask, unstructured or N:M.

The form of OATS (arXiv 2409.13652), fitted to the outputs as in linalg/masked.py. At equal bytes,
bitmask included, it is closer to the dense model than any form that is also faster
(benchmarks/sparse_quality.py); it costs as many MACs as the dense layer, and more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError
from ..linalg.masked import ITERATIONS, Keep
from ..nn import LowRankMaskedLinear, low_rank_masked_cost
from ..types import Curve, Option, Site, Size, Statistics
from ..walk import layouts
from .common import gram_of
from .sampled import pareto_front, sampled_curve, sizes_of

RANKS = (0.02, 0.06)  # both are useful: the larger one at high ratios
STEPS = 100  # sizes of a curve, for each rank
STORAGE = "lowrank-masked"


@dataclass(frozen=True)
class LowRankMasked:
    """Options: `pattern`, "unstructured" or (N, M), N of each M consecutive inputs of a row;
    `ranks`, as shares of min(out, in), to combine with an unstructured S; `iterations` of the
    solver; `seed` as for `SVD`.

    Sizes are (r, k), k kept entries. With (N, M) the pattern fixes k, and r is any rank. The curve
    is an interpolation, not exact: see `sampled_curve`.
    """

    seed: int = 0
    pattern: str | tuple[int, int] = "unstructured"
    ranks: tuple[float, ...] = RANKS
    iterations: int = ITERATIONS
    kinds = frozenset({"linear"})
    needs = frozenset({"gram"})
    own_form = STORAGE
    measured = "output"  # the norm of its errors

    def __post_init__(self) -> None:
        pair = self.pattern
        whole = isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair)
        if pair != "unstructured" and not (whole and 1 <= int(pair[0]) < int(pair[1])):
            raise LowrankError(
                "pattern must be 'unstructured' or (N, M) with 1 <= N < M, such as (2, 4); "
                f"got {self.pattern!r}"
            )
        if not self.ranks or not all(0 < share < 1 for share in self.ranks):
            raise LowrankError(f"ranks must be shares in (0, 1), got {self.ranks!r}")
        if not isinstance(self.iterations, int) or self.iterations < 0:
            raise LowrankError(f"iterations must be an integer >= 0, got {self.iterations!r}")

    @property
    def name(self) -> str:
        """The name tells the pattern, since sizes do not."""
        if isinstance(self.pattern, str):
            return STORAGE
        return f"lowrank-{self.pattern[0]}:{self.pattern[1]}"

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weight, gram = layouts.matrix(site.module), self._metric(stats, site.shape[1])
        total = linalg.squared_error(weight, torch.zeros_like(weight), gram)

        def error(size: Size, share: float) -> float:
            parts = self._parts(weight, size, gram, math.ceil(share * self.iterations))
            return linalg.squared_error(weight, parts.up @ parts.down + parts.sparse, gram)

        cost = partial(low_rank_masked_cost, *site.shape, itemsize=weight.dtype.itemsize)
        options = [
            replace(option, method=self.name)
            for sizes in self._sizes(site.shape)
            for option in sampled_curve(site, STORAGE, sizes, cost, error, total).options
            if not option.dense
        ]
        return Curve(
            site.names, pareto_front(site, options), total, None, self.measured, exact=False
        )

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight = layouts.matrix(module)
        rank, count = sizes_of(option, module, "rank, entries")
        free = isinstance(self.pattern, str)
        most = weight.numel() if free else self._kept(weight.shape)
        if rank > min(weight.shape) or count > most or (count < most and not free):
            raise LowrankError(
                f"a size ({rank}, {count}) needs a rank up to {min(weight.shape)} and "
                f"{'at most ' * free}{most} entries"
            )
        gram = self._metric(stats, weight.shape[1])
        parts = self._parts(weight, (rank, count), gram, self.iterations)
        down, up, sparse = (part.to(weight) for part in (parts.down, parts.up, parts.sparse))
        bias = layouts.bias(module)
        return LowRankMaskedLinear.from_parts(down, up, sparse, parts.mask, bias)

    def _metric(self, stats: Statistics, in_features: int) -> Tensor | None:
        return gram_of(stats, in_features)

    def _keep(self, count: int) -> Keep:
        if isinstance(self.pattern, tuple):
            return partial(linalg.nm_mask, n=self.pattern[0], m=self.pattern[1])
        return linalg.largest(count)

    def _parts(
        self, weight: Tensor, size: Size, gram: Tensor | None, iterations: int
    ) -> linalg.MaskedParts:
        return linalg.low_rank_masked(
            weight, size[0], self._keep(size[1]), gram, iterations=iterations, seed=self.seed
        )

    def _sizes(self, shape: tuple[int, int]) -> Iterator[list[Size]]:
        """The sizes of each curve, cost rising."""
        least, entries = min(shape), shape[0] * shape[1]
        if isinstance(self.pattern, tuple):
            yield [(rank, self._kept(shape)) for rank in range(1, least + 1)]
            return
        for rank in sorted({max(1, round(share * least)) for share in self.ranks}):
            counts = (round(step * entries / STEPS) for step in range(1, STEPS))
            yield [(rank, count) for count in sorted({*counts} - {0})]

    def _kept(self, shape: torch.Size | tuple[int, int]) -> int:
        """Entries that N:M keeps of a matrix."""
        n, m = cast(tuple[int, int], self.pattern)
        return shape[0] * (n * (shape[1] // m) + math.ceil(n * (shape[1] % m) / m))


@dataclass(frozen=True)
class LowRank24(LowRankMasked):
    """Low rank plus 2:4, the pattern that accelerators support."""

    pattern: str | tuple[int, int] = (2, 4)
