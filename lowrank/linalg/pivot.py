"""A product of rank r in r(m + n − r) numbers: r rows as they are, the others mixed from them.

W = up · down has r rows P such that W[rest] = C W[P] (PIFA, arXiv 2501.19090). Their code pivots
on the whole of W; here, on an orthonormal basis of its outputs, O(m r²): C belongs to the space of
columns alone, so that factors of a smaller true rank, and zeros, are no special case. A basis has
full rank whatever the factors are, and |C| ≤ 2 can always be reached.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gram import full_precision

BOUND = 2.0  # the largest |coefficient|; rounding errors of the pivots are multiplied by C


class PivotedFactors(NamedTuple):
    """W (m, n) of rank r: `W[order[:r]]` is `kept`, `W[order[r:]]` is `mix @ kept`.

    Attributes:
        kept: (r, n) float64, already rounded to the dtype that it will be stored in.
        mix: (m − r, r) float64.
        order: (m,) int64, the pivots first; both parts ascend.
    """

    kept: Tensor
    mix: Tensor
    order: Tensor


def pivoted(up: Tensor, down: Tensor, dtype: torch.dtype) -> PivotedFactors:
    """The pivoted form of W = up (m, r) · down (r, n), for pivot rows that are stored in `dtype`.

    C is fitted to the pivots as they are rounded; still, 16 bits cost this form more than plain
    factors (benchmarks/speed.py).

    Args:
        up, down: in the compute dtype; r < m.
    """
    with full_precision(up):
        basis = torch.linalg.qr(up).Q
        pivots = pivot_rows(basis)
        order = torch.cat([pivots, _others(pivots, len(up))])
        kept = (up[pivots] @ down).double()
        stored = kept.to(dtype).double()
        mix = mixed_from(basis, pivots)[order[len(pivots) :]].double()
        return PivotedFactors(stored, mix @ _refit(kept, stored, dtype), order)


def pivot_rows(basis: Tensor, *, most: int | None = None) -> Tensor:
    """r rows by which all rows of `basis` (m, r) are mixed with coefficients of at most `BOUND`.

    Gaussian elimination with row pivoting chooses the first set. Then rows are exchanged (Goreinov
    et al., How to find a good submatrix, 2010): each exchange multiplies the volume |det| of the
    set by more than `BOUND`, so that they come to an end; on random bases there is seldom one.

    Args:
        basis: of full column rank, best orthonormal.
        most: exchanges after which the set is given back as it is; None: 64 + 8 r.

    Returns:
        (r,) int64, ascending.
    """
    rank, left = basis.shape[1], 64 + 8 * basis.shape[1] if most is None else most
    pivots = _eliminated(basis)
    while True:  # the coefficients are solved anew until a fresh solution needs no exchange
        mix, before = mixed_from(basis, pivots), left
        while left:
            row, column = divmod(int(mix.abs().argmax()), rank)
            pivot = mix[row, column]
            if not abs(float(pivot)) > BOUND * (1 + 1e-6):
                break
            change = mix[row].clone()
            change[column] -= 1
            mix -= torch.outer(mix[:, column] / pivot, change)
            pivots[column] = row
            left -= 1
        if left in (0, before):
            return pivots.sort().values


def mixed_from(basis: Tensor, pivots: Tensor) -> Tensor:
    """C (m, r) with basis = C · basis[pivots]."""
    solved: Tensor = torch.linalg.solve(basis[pivots].T, basis.T)
    return solved.T.contiguous()


def _eliminated(basis: Tensor) -> Tensor:
    """The pivot rows of Gaussian elimination, (r,)."""
    exchanges = torch.linalg.lu_factor_ex(basis).pivots.tolist()
    rows = list(range(len(basis)))
    for here, there in enumerate(exchanges):  # counted from 1, as LAPACK does
        rows[here], rows[there - 1] = rows[there - 1], rows[here]
    return torch.tensor(rows[: basis.shape[1]], device=basis.device)


def _others(pivots: Tensor, count: int) -> Tensor:
    """The numbers below `count` that are no pivots, ascending."""
    rest = torch.ones(count, dtype=torch.bool, device=pivots.device)
    rest[pivots] = False
    return rest.nonzero()[:, 0]


def _refit(kept: Tensor, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """T (r, r): C T mixes the rounded pivots best, by least squares, where C mixes exact ones.

    Directions of `kept` (r, n) below its rounding are left to C: a ridge of the size of the
    rounding's energy keeps them from blowing up.
    """
    rank = len(kept)
    one = torch.eye(rank, dtype=kept.dtype, device=kept.device)
    gram = stored @ stored.T
    energy = float(gram.diagonal().sum())
    if energy == 0 or torch.equal(kept, stored):
        return one
    floor = max(torch.finfo(dtype).eps ** 2 / rank, rank * torch.finfo(gram.dtype).eps)
    ridge = floor * energy * one
    root = torch.linalg.cholesky(gram + ridge)
    return torch.cholesky_solve((kept @ stored.T + ridge).T, root).T
