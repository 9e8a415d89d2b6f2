"""Mixed dimensions (Ginart et al., arXiv 1909.11810): tables of rarely read rows get less rank.

A row of a table of n rows is read about 1/n as often as that of a table of one, so that its rank is
d = λ n^−α, between one and the width D, above break-even dense. With α given, λ is solved for the
budget. With α None, λ = D · n_min^α, which leaves the smallest table its whole width, and α in
[0, 1] is the least that fits, as in DLRM's and Hetu's code; where α = 1 is not enough, λ falls. The
rule asks for no data and no spectrum: it is for many tables of very different lengths, before they
are trained too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import LowrankError
from ..types import Allocation, Budget, Curve, Probe
from .common import Choice, disjoint, gated, least_that_fits, spent

STEPS = 40  # of the bisection for α
Chooser = Callable[[float, float], Choice]  # (α, λ) ->


@dataclass(frozen=True)
class MixedDimensions:
    """Of a weight that is no table, n is the longer side.

    Attributes:
        alpha: α in [0, 1]; 0 gives all tables one rank. None is solved for.
    """

    alpha: float | None = 0.3

    judges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise LowrankError(f"alpha must be in [0, 1] or None, got {self.alpha!r}")

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        by_sites = disjoint(curves)
        rows = {sites: sides(curve) for sites, curve in by_sites.items()}

        def choose(alpha: float, scale: float) -> Choice:
            return {
                sites: gated(curve, rank_at(rows[sites], alpha, scale))
                for sites, curve in by_sites.items()
            }

        if self.alpha is not None:
            return self._scaled(self.alpha, choose, list(rows.values()), budget)
        first = min(n for n, _ in rows.values())
        width = max(d for _, d in rows.values())

        def full(alpha: float) -> Choice:
            return choose(alpha, width * first**alpha)

        return _least_alpha(full, budget) or self._scaled(1.0, choose, list(rows.values()), budget)

    @staticmethod
    def _scaled(
        alpha: float, choose: Chooser, rows: Sequence[tuple[int, int]], budget: Budget
    ) -> Choice:
        """The choice at the largest λ that fits: ranks change where λ n^−α is an integer."""
        scales = {rank * n**alpha for n, d in rows for rank in range(1, d + 1)}
        falling = sorted(scales, reverse=True)
        return least_that_fits(
            [1 / scale for scale in falling], lambda t: choose(alpha, 1 / t), budget,
            "mixed-dimensions",
        )  # fmt: skip


def rank_at(sides: tuple[int, int], alpha: float, scale: float) -> int:
    """⌊λ n^−α⌋ of a table (n, D), at least one and at most what it can have."""
    rows, most = sides
    wanted: int = math.floor(scale / float(rows) ** alpha + 1e-9)
    return min(max(1, wanted), most)


def sides(curve: Curve) -> tuple[int, int]:
    """The longer and the shorter side of the weight, from what its ranks cost.

    Raises:
        LowrankError: its options are no ranks.
    """
    option, numbers = curve.options[0], curve.dense.cost.params
    if option.size is None:
        return numbers, 1
    if len(option.size) != 1:
        raise LowrankError(
            f"mixed-dimensions gives ranks, but {curve.sites[0] or '(root)'} is stored as "
            f"{option.storage} of size {option.size}: use another policy, or method 'svd'"
        )
    (rank,) = option.size
    both = option.cost.params // rank + (rank if option.storage == "pivoted" else 0)
    apart = math.isqrt(max(both * both - 4 * numbers, 0))
    return (both + apart) // 2, (both - apart) // 2


def _least_alpha(full: Callable[[float], Choice], budget: Budget) -> Choice | None:
    """The choice at the least α in [0, 1] that fits; None if none does."""
    low, high = 0.0, 1.0
    for alpha in (low, high):
        chosen = full(alpha)
        if spent(chosen.values(), budget.unit) <= budget.limit:
            break
    else:
        return None
    for _ in range(STEPS if alpha else 0):
        middle = (low + high) / 2
        trial = full(middle)
        if spent(trial.values(), budget.unit) <= budget.limit:
            high, chosen = middle, trial
        else:
            low = middle
    return chosen
