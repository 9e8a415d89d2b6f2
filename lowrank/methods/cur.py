"""CUR: W ≈ C U R, columns and rows of the weight itself and a small matrix between them.

Mahoney and Drineas (PNAS 106, 2009); as a meta-factorization arXiv 2105.10278. C and R are copies
of columns and rows of W, bit for bit, and U is their least-squares fit in ‖(W − Ŵ)H^½‖, H the
identity (`cur`) or E[x xᵀ] (`whitened-cur`). Stored are all three, r (out + in + r) numbers; U
multiplied into C would save r² of them, but then C would no longer be the weight's own. Never
nearer than `svd` or `whitened`, of equal numbers or of equal rank. Unlike in the paper nothing is
drawn at random: rows and columns are chosen by pivoted QR, or by descending leverage scores
(linalg/cur.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from .. import linalg
from ..errors import unknown
from ..nn import CURLinear, cur_cost
from ..types import Curve, Option, Site, Statistics
from ..walk import layouts
from .common import gram_of, options_of, rank_of


@dataclass(frozen=True)
class CUR:
    """Options: `choice` of rows and columns, "pivoted" (QR) or "leverage" (scores in the leading
    quarter of the singular vectors). `seed` is not used: nothing is random.
    """

    seed: int = 0
    choice: linalg.Choice = "pivoted"
    kinds = frozenset({"linear"})
    needs = frozenset[str]()
    own_form = "cur"
    name = "cur"

    def __post_init__(self) -> None:
        if self.choice not in linalg.CHOICES:
            raise unknown("choice", str(self.choice), linalg.CHOICES)

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weight = layouts.matrix(site.module)
        cross = self._cross(weight, largest_rank(*weight.shape), stats)
        errors = list(enumerate(cross.errors().tolist()))[1:]
        cost = partial(cur_cost, *site.shape, itemsize=weight.dtype.itemsize)
        options = options_of(site, self.name, "cur", errors, cost)
        norm = "output" if self.needs else "weight"
        return Curve(site.names, options, cross.total, None, norm, exact=True)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        weight, rank = layouts.matrix(module).detach(), rank_of(option, module)
        cross = self._cross(weight, max(rank, largest_rank(*weight.shape)), stats)
        rows, columns = weight[cross.rows[:rank]], weight[:, cross.columns[:rank]]
        middle = cross.middle(rank)
        if not bool(middle.to(weight.dtype).isfinite().all()):  # of weights near the least number
            unit = linalg.unit_of(weight)
            rows, middle = rows / unit, middle * unit
        parts = (alive(columns.T).T, middle.to(weight), alive(rows))
        return CURLinear.from_parts(*parts, layouts.bias(module))

    def _cross(self, weight: Tensor, most: int, stats: Statistics) -> linalg.Cross:
        gram = gram_of(stats, weight.shape[1]) if self.needs else None
        return linalg.cross_of(weight, most, gram, choice=self.choice)


@dataclass(frozen=True)
class WhitenedCUR(CUR):
    """CUR by output error.

    Options: as for `CUR`.
    """

    needs = frozenset({"gram"})
    name = "whitened-cur"


def largest_rank(out_features: int, in_features: int) -> int:
    """The largest rank whose C, U and R are smaller than the dense weight; at least 1."""
    least = min(out_features, in_features)
    fits = (r for r in range(least, 1, -1) if _params(out_features, in_features, r))
    return next(fits, 1)


def _params(out_features: int, in_features: int, rank: int) -> bool:
    cost = cur_cost(out_features, in_features, rank, itemsize=1)
    return cost.params < out_features * in_features


def alive(rows: Tensor) -> Tensor:
    """Rows (r, n) with a unit vector in place of each that is zero: the middle matrix takes nothing
    of it, and with both sides zero no gradient could reach any of the three."""
    zero = (rows == 0).all(1)
    if bool(zero.any()):
        rows = rows.clone()
        rows[zero, zero.nonzero()[:, 0] % rows.shape[1]] = 1
    return rows
