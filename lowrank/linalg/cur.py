"""CUR: W ≈ C U R of columns and rows of W itself (Mahoney and Drineas, PNAS 106, 2009).

For given columns C = W[:, J] and rows R = W[I] the best middle matrix in ‖(W − Ŵ)H^½‖ is
U = C⁺ W H^½ (R H^½)⁺, and the error is what the two orthogonal projections leave. The cross form
U = W[I, J]⁻¹ needs no product with W, but can be a hundred times farther.

Rows and columns are put in one order for all ranks, so that a rank takes the first of them: with
Q_C T_C = C (QR) and L the Cholesky factor of R H Rᵀ, all errors are in M = Q_Cᵀ W H Rᵀ L⁻ᵀ, of
which rank r takes the leading block, and U = T_C⁻¹ M L⁻¹.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .gram import ROUNDING, full_precision, safe_root, squared_error
from .svd import compute_dtype, output_basis

Choice = Literal["pivoted", "leverage"]
CHOICES: tuple[Choice, ...] = ("pivoted", "leverage")
BLOCK = 64  # pivots between two updates of the whole matrix
LEADING = 4  # leverage scores are of the leading 1/4 of the singular vectors


class Cross(NamedTuple):
    """CUR of W at every rank up to k.

    Attributes:
        rows, columns: (k,) int64, the first r of which are those of rank r.
        left: T_C (k, k), upper triangular.
        core: M (k, k).
        right: L (k, k), lower triangular.
        total: ‖W H^½‖².
    """

    rows: Tensor
    columns: Tensor
    left: Tensor
    core: Tensor
    right: Tensor
    total: float

    def errors(self) -> Tensor:
        """Squared errors at ranks 0…k, (k + 1,) float64."""
        blocks = self.core.double().square().cumsum(0).cumsum(1).diagonal()
        rest = torch.cat([blocks.new_zeros(1), blocks]).neg().add(self.total)
        noise = len(rest) * torch.finfo(self.core.dtype).eps * self.total
        return torch.where(rest > noise, rest, 0).cummin(0).values

    def middle(self, rank: int) -> Tensor:
        """U (rank, rank) of the first `rank` columns and rows."""
        with full_precision(self.core):
            core = self.core[:rank, :rank]
            core = torch.linalg.solve_triangular(self.left[:rank, :rank], core, upper=True)
            solved: Tensor = torch.linalg.solve_triangular(
                self.right[:rank, :rank], core, upper=False, left=False
            )
            return solved


def cross_of(
    weight: Tensor, most: int, gram: Tensor | None = None, *, choice: Choice = "pivoted"
) -> Cross:
    """CUR of W in the norm ‖· H^½‖, for all ranks up to `most`.

    Args:
        weight: W (out, in).
        most: in [1, min(out, in)].
        gram: H (in, in), or None for the identity.
        choice: "pivoted": pivoted QR of W H^½ for the rows, of W diag(H)^½ for the columns;
            "leverage": in the order of their leverage scores in the leading quarter of the singular
            vectors of the same matrices, which takes a decomposition.

    Returns:
        Computed in the compute dtype; rows and columns that depend on others come last and have
        no part in the middle matrix. One depends on those before it if no more than √ε of the
        largest is its own, ε of the weight's dtype: rounding a middle matrix that used it would
        lose more than it gains.
    """
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    metric = None if gram is None else gram.to(matrix)
    with full_precision(matrix):
        scaled = matrix if metric is None else matrix * metric.diagonal().clamp(min=0).sqrt()
        if choice == "pivoted":
            outer = matrix if metric is None else matrix @ metric
            rows = pivoted_order(outer @ matrix.T, most)
            columns = pivoted_order(scaled.T @ scaled, most)
        else:
            rows, columns = _by_leverage(matrix, metric, most), _by_leverage(scaled.T, None, most)
        least = torch.finfo(weight.dtype).eps ** 0.5
        columns, basis, left = _orthonormal(matrix.T, columns, None, least)
        rows, other, right = _orthonormal(matrix, rows, metric, least)
        core = matrix.new_zeros(most, most)
        core[: basis.shape[1], : other.shape[1]] = basis.T @ matrix @ other
        total = squared_error(matrix, torch.zeros_like(matrix), metric)
        return Cross(rows, columns, _padded(left.T, most), core, _padded(right, most), total)


def pivoted_order(gram: Tensor, count: int) -> Tensor:
    """The first `count` pivots of a pivoted QR of A, from AᵀA (n, n): (count,) int64.

    Each is the column that is farthest from the span of those before it (LAPACK's rule). A pivoted
    Cholesky factorisation finds the same ones; the matrix is updated once a block.
    """
    rest, order = (gram + gram.T) / 2, list[int]()
    while len(order) < count:
        energy = rest.diagonal().clone()
        energy[order] = -torch.inf
        block = rest.new_zeros(min(BLOCK, count - len(order)), len(rest))
        for step in range(len(block)):
            place = int(energy.argmax())
            order.append(place)
            row = rest[place] - block[:step, place] @ block[:step]
            block[step] = row / energy[place].clamp(min=torch.finfo(rest.dtype).tiny).sqrt()
            if not bool(energy[place] > 0):  # nothing is left: any order will do
                block[step] = 0
            energy = (energy - block[step].square()).clamp(min=0)
            energy[order] = -torch.inf
        rest = rest - block.T @ block
    return torch.tensor(order, device=gram.device)


def _by_leverage(matrix: Tensor, metric: Tensor | None, count: int) -> Tensor:
    """The rows of largest leverage in the leading left singular vectors of A H^½, descending."""
    basis = output_basis(matrix, max(1, min(matrix.shape) // LEADING), metric)
    return basis.square().sum(1).sort(descending=True, stable=True).indices[:count]


def _orthonormal(
    matrix: Tensor, rows: Tensor, metric: Tensor | None, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows (k,), independent ones first; H Rᵀ L⁻ᵀ (in, c) of these, and L (c, c).

    With H = I that is an orthonormal basis of the rows.
    """
    if metric is not None:  # nothing is known of it below its own rounding
        least = max(least, (ROUNDING * len(metric) ** 0.5) ** 0.5)
    for _ in range(2):  # those that depend on others are put last, then it is made anew
        chosen = matrix[rows]
        if metric is None:
            basis, triangle = torch.linalg.qr(chosen.T)
            triangle = triangle.T
        else:
            triangle = safe_root(chosen @ metric @ chosen.T)
        size = _largest(chosen, metric)
        alive = (triangle.diagonal().abs() > least * size) & (size > 0)
        rows = torch.cat([rows[alive], rows[~alive]])
    count = int(alive.sum())
    if metric is None:
        return rows, basis[:, :count], triangle[:count, :count]
    weighed = matrix[rows[:count]] @ metric
    plain, failed = torch.linalg.cholesky_ex(weighed @ matrix[rows[:count]].T)
    triangle = (
        triangle[:count, :count] if bool(failed) else plain
    )  # without the ridge, if it can be
    solved: Tensor = torch.linalg.solve_triangular(triangle, weighed, upper=False)
    return rows, solved.T, triangle


def _largest(rows: Tensor, metric: Tensor | None) -> Tensor:
    """The largest norm of a row, in the metric."""
    energy = (rows if metric is None else rows @ metric) * rows
    return energy.sum(1).clamp(min=0).max().sqrt()


def _padded(triangle: Tensor, side: int) -> Tensor:
    """With ones on the rest of the diagonal, (side, side)."""
    whole = torch.eye(side, dtype=triangle.dtype, device=triangle.device)
    whole[: len(triangle), : len(triangle)] = triangle
    return whole
