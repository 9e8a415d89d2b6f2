"""A rank-r matrix in r(m + n − r) numbers: r pivot rows, and the others as combinations of them.

W = up · down has r rows P such that W[rest] = C W[P] (PIFA, arXiv 2501.19090). Their code pivots
on W itself; ours on an orthonormal basis of its outputs, O(m r²): C depends on the column space
alone, so that rank-deficient or zero factors need no special case. The basis always has full rank,
and |C| ≤ 2 can always be reached.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gram import full_precision, shifted_root

BOUND = 2.0  # the largest |coefficient|: C amplifies rounding errors of the pivots


class PivotedFactors(NamedTuple):
    """W (m, n) of rank r: `W[order[:r]]` is `kept`, `W[order[r:]]` is `mix @ kept`.

    Attributes:
        kept: (r, n) float64, already rounded to the storage dtype.
        mix: (m − r, r) float64.
        order: (m,) int64, the pivots first; both parts ascending.
    """

    kept: Tensor
    mix: Tensor
    order: Tensor


def pivoted(up: Tensor, down: Tensor, dtype: torch.dtype) -> PivotedFactors:
    """The pivoted form of W = up (m, r) · down (r, n), with pivot rows stored in `dtype`.

    C is fitted to the rounded pivots; still, 16 bits cost this form more accuracy than plain
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
    """Indices of r rows that express all rows of `basis` (m, r) with |coefficients| ≤ `BOUND`.

    Gaussian elimination with row pivoting chooses the first set. Then rows are exchanged (Goreinov
    et al., How to find a good submatrix, 2010): each exchange multiplies the volume |det| of the
    set by more than `BOUND`, so that the process terminates; on random bases exchanges are rare.

    Args:
        basis: of full column rank, ideally orthonormal.
        most: maximum number of exchanges; None: 64 + 8 r.

    Returns:
        (r,) int64, ascending.
    """
    rank, left = basis.shape[1], 64 + 8 * basis.shape[1] if most is None else most
    pivots = _eliminated(basis)
    while True:  # re-solve for the coefficients until a fresh solution needs no exchange
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
    for row, partner in enumerate(exchanges):  # LAPACK counts from 1
        rows[row], rows[partner - 1] = rows[partner - 1], rows[row]
    return torch.tensor(rows[: basis.shape[1]], device=basis.device)


def _others(pivots: Tensor, count: int) -> Tensor:
    """The indices below `count` that are not pivots, ascending."""
    rest = torch.ones(count, dtype=torch.bool, device=pivots.device)
    rest[pivots] = False
    return rest.nonzero()[:, 0]


def _refit(kept: Tensor, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """T (r, r) such that C T is the least-squares fit to rounded pivots, as C is to exact ones.

    Directions of `kept` (r, n) below its rounding are left to C: a ridge of the rounding's energy
    keeps them bounded.
    """
    rank = len(kept)
    one = torch.eye(rank, dtype=kept.dtype, device=kept.device)
    gram = stored @ stored.T
    energy = float(gram.diagonal().sum())
    if energy == 0 or torch.equal(kept, stored):
        return one
    floor = max(torch.finfo(dtype).eps ** 2 / rank, rank * torch.finfo(gram.dtype).eps)
    root, ridge = shifted_root(gram, gram.new_tensor([floor * energy]))
    solved: Tensor = torch.cholesky_solve((kept @ stored.T + ridge * one).T, root)
    return solved.T
