"""Semi-NMF: W ≈ up · down with up ≥ 0 and down of any sign (Ding, Li and Jordan, TPAMI 32, 2010).

Their updates with F = downᵀ, G = up, X = Wᵀ: down is the least-squares solution, and
up ← up · √(([W downᵀ]⁺ + up [down downᵀ]⁻) / ([W downᵀ]⁻ + up [down downᵀ]⁺)), where A⁺ and A⁻
are the positive and the negative part of A. Neither step raises the error.

The start matters more than the updates. Gillis and Kumar (arXiv 1410.7220) take it from the SVD:
if the span of the leading r left singular vectors contains a vector p > 0, any basis of it can be
shifted along p until it is non-negative, and the error *is* the tail of the SVD. Otherwise p takes
one of the r places, and the error is at most the tail of r − 1. A second start, the larger half of
each leading direction, has no such bound but is often better; the better result is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .gram import full_precision
from .svd import balance, compute_dtype, output_basis

ITERATIONS = 100
STOP = 1e-5  # least relative decrease of the error for another iteration
SEARCH = 300  # steps in the search for a positive vector
STEEP = 0.02  # least cosine between a positive vector and the rows of the basis
CONDITION = 500  # of up; above it components cancel, and 16 bits lose more than is gained
FLOOR = 0.2  # of a column's mean, added: the updates cannot leave zero
MARGIN = 1.1  # of the shift along p, for the same reason


def semi_nmf(
    weight: Tensor, rank: int, *, iterations: int = ITERATIONS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Semi-NMF factors of W, the left one non-negative.

    Args:
        weight: W (out, in).
        rank: in [1, min(out, in)].
        iterations: maximum number of updates; 0 keeps the start.
        seed: of the randomised SVD that starts very large matrices at small ranks.

    Returns:
        up (out, rank) ≥ 0 and down (rank, in) in the compute dtype, balanced. ‖W − up·down‖² lies
        between the tails of ranks `rank` and `rank` − 1 of the SVD.
    """
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    with full_precision(matrix):
        basis = output_basis(matrix, rank, seed=seed)
        tail = _error(matrix, basis, basis.T @ matrix)
        best: tuple[float, Tensor, Tensor] | None = None
        for up in _starts(matrix, basis, seed):
            candidate = _descend(matrix, up, iterations, tail)
            best = candidate if best is None or candidate[0] < best[0] else best
            if best[0] <= tail * (1 + STOP):
                break
        assert best is not None
        return balance(*best[1:])


def _descend(
    matrix: Tensor, up: Tensor, iterations: int, least: float
) -> tuple[float, Tensor, Tensor]:
    """Error, up and down after updates from `up`, until the error is `least` or stops falling."""
    down = _least_squares(up, matrix)
    error = _error(matrix, up, down)
    for _ in range(iterations):
        if error <= least * (1 + STOP):
            break
        trial = _update(matrix, up, down)
        solved = _least_squares(trial, matrix)
        new_error = _error(matrix, trial, solved)
        if not new_error < error * (1 - STOP):
            break
        up, down, error = trial, solved, new_error
    return error, up, down


def _starts(matrix: Tensor, basis: Tensor, seed: int) -> Iterator[Tensor]:
    """Starts up (out, rank) ≥ 0, from the leading left singular vectors of W."""
    positive = _positive(basis)
    shifted = None if positive is None else _shifted(basis, positive)
    if shifted is not None and torch.linalg.cond(shifted) <= CONDITION:
        yield shifted
    halves = torch.stack([basis.clamp(min=0), (-basis).clamp(min=0)])  # (2, out, rank)
    larger = halves.norm(dim=1, keepdim=True).argmax(0, keepdim=True)
    parts = halves.gather(0, larger.expand(1, *basis.shape))[0]
    yield parts + FLOOR * parts.mean(0)
    if basis.shape[1] == 1:
        return
    ones = matrix.new_full((matrix.shape[0], 1), matrix.shape[0] ** -0.5)
    residual = output_basis(matrix - ones @ (ones.T @ matrix), basis.shape[1] - 1, seed=seed)
    residual = torch.linalg.qr(residual - ones @ (ones.T @ residual)).Q
    yield torch.cat([ones, _shifted(residual, ones[:, 0])], dim=1)


def _positive(basis: Tensor) -> Tensor | None:
    """A vector > 0 in the span of the columns (out, rank), or None if the search finds none.

    The perceptron: while an entry of basis·z is not positive, its row is added to z. It converges
    if such a vector exists with some margin.
    """
    rows = torch.nn.functional.normalize(basis, dim=1)
    z = rows.sum(0)
    for _ in range(SEARCH):
        along = rows @ z
        least = along.argmin()
        if along[least] > STEEP * torch.linalg.vector_norm(z):
            return basis @ z
        z = z + rows[least]
    return None


def _shifted(basis: Tensor, positive: Tensor) -> Tensor:
    """The columns, each shifted along `positive` until it is non-negative."""
    most = (-basis / positive[:, None]).amax(0).clamp(min=0)  # (rank,)
    return (basis + MARGIN * most * positive[:, None]).clamp(min=0)


def _update(matrix: Tensor, up: Tensor, down: Tensor) -> Tensor:
    towards, inner = matrix @ down.T, down @ down.T
    more = towards.clamp(min=0) + up @ (-inner).clamp(min=0)
    less = (-towards).clamp(min=0) + up @ inner.clamp(min=0)
    floor = torch.finfo(matrix.dtype).eps * torch.maximum(more, less).amax()
    floor = floor.clamp(min=torch.finfo(matrix.dtype).tiny)  # a zero weight has no scale
    return up * ((more + floor) / (less + floor)).sqrt()


def _least_squares(up: Tensor, matrix: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.pinv(up) @ matrix
    return solution


def _error(matrix: Tensor, up: Tensor, down: Tensor) -> float:
    return float((matrix - up @ down).double().square().sum())
