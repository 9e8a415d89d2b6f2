"""A dense basis with sparse coefficients: W ≈ C · D, exactly s of the r atoms in every row of W.

DSFormer (arXiv 2312.13211) factors so; of it only the abstract was at hand, and what follows is our
own: K-SVD's alternation in the norm of the outputs. With D of unit length in that norm,
d H dᵀ = 1, everything that the coefficients need are W H Dᵀ and D H Dᵀ, and the least-squares
basis (CᵀC)⁻¹CᵀW is the same for every H: neither H nor a root of it is ever inverted.

The start is an orthonormal basis of the outputs, turned by Procrustes' rotation until thresholding
loses least (COMPOT does the same). On a basis like that the s largest coefficients are optimal;
afterwards matching pursuit chooses atoms, for all rows at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gram import safe_root
from .precision import full_precision
from .svd import compute_dtype, output_basis

SWEEPS = 15  # of coefficients and basis in turn
TURNS = 30  # of the orthonormal start
STOP = 1e-3  # relative decrease of the error in one sweep, below which no more are made
CHUNK = 2**24  # numbers of the rows' own Gram matrices at once
ROUNDS = 8  # of a pursuit: so many times it looks at what is left


class SparseCode(NamedTuple):
    """W (out, in) ≈ Σ_t value[:, t] · basis[atoms[:, t]].

    Attributes:
        basis: D (r, in), in the compute dtype.
        value: (out, s).
        atoms: (out, s) int64, ascending in each row.
    """

    basis: Tensor
    value: Tensor
    atoms: Tensor

    def coefficients(self) -> Tensor:
        """C (out, r)."""
        return spread(self.value, self.atoms, len(self.basis))


def spread(value: Tensor, index: Tensor, rank: int) -> Tensor:
    """(out, r) with `value` (out, s) at the places `index` (out, s) of its rows."""
    return value.new_zeros(len(value), rank).scatter(1, index, value)


def pursuit(
    products: Tensor, gram: Tensor, count: int, *, rounds: int | None = None
) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of all rows at once: least squares on `count` atoms of each.

    Args:
        products: ⟨w_i, d_j⟩ (rows, r) of the rows with the atoms.
        gram: ⟨d_i, d_j⟩ (r, r) of the atoms.
        count: s in [1, r].
        rounds: atoms are chosen in so many rounds, s / rounds of them at once by their product
            with what is left; None: one at a time, the textbook's pursuit. Each round costs a solve
            for every row.

    Returns:
        value, index: (rows, s); index ascending, no atom twice.
    """
    rows, rank = products.shape
    rounds = min(count, rounds or count)
    size = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
    chosen = products.new_zeros(rows, rank, dtype=torch.bool)
    index = products.new_zeros(rows, 0, dtype=torch.int64)
    left = products
    for turn in range(1, rounds + 1):
        more = count * turn // rounds - index.shape[1]
        score = (left.square() / size).masked_fill(chosen, -1.0)
        found = score.topk(more, dim=1, sorted=False).indices
        chosen.scatter_(1, found, True)
        index = torch.cat([index, found], 1).sort(1).values
        value = _on_support(products, gram, index)
        left = products - spread(value, index, rank) @ gram
    return value, index


def dense_sparse(
    weight: Tensor,
    rank: int,
    count: int,
    gram: Tensor | None = None,
    *,
    sweeps: int = SWEEPS,
    rounds: int | None = ROUNDS,
    seed: int = 0,
) -> SparseCode:
    """C and D of little error ‖(W − C D) H^½‖, alternating from an orthonormal start.

    Args:
        weight: W (out, in).
        rank: r ≥ 1, the number of atoms; it may be above min(out, in).
        count: s in [1, r], of every row.
        gram: H (in, in), or None for the identity.
        sweeps: at most so many; 0 keeps the thresholded start.
        rounds: of each pursuit, see there.
        seed: of the atoms beyond the rank of W, which are drawn.

    Returns:
        The best of all sweeps. An atom that no row uses was replaced by the row that was met worst.
    """
    dtype = compute_dtype(min(weight.shape))
    matrix = weight.detach().to(dtype)
    metric = None if gram is None else gram.to(matrix)
    with full_precision(matrix):
        basis = _start(matrix, rank, count, metric, seed)
        code, least = _coded(matrix, basis, metric, count, 1)  # orthonormal: thresholding
        if count == 1:  # rows are points on lines then, and a bad start stays bad
            found, error = _coded(matrix, _far_rows(matrix, basis, metric), metric, count, 1)
            code, least = (found, error) if error < least else (code, least)
        best = code
        for _ in range(sweeps):
            basis, before = _refreshed(matrix, code, metric), least
            code, error = _coded(matrix, basis, metric, count, rounds)
            if error < least:
                best, least = code, error
            if not error < before * (1 - STOP):
                break
        fitted = _least_squares(matrix, best.coefficients())
        used = best.coefficients().abs().amax(0) > 0
        basis = torch.where(used[:, None], fitted, best.basis)
        return balanced(best._replace(basis=basis))


def balanced(code: SparseCode) -> SparseCode:
    """Every atom as long as its column of coefficients; one that carries nothing keeps length 1."""
    coefficients = code.coefficients()
    up, down = coefficients.norm(dim=0), code.basis.norm(dim=1)
    alive = (up > 0) & (down > 0)
    scale = torch.where(alive, (up / down.where(alive, 1)).sqrt(), 1 / down.where(down > 0, 1))
    value = code.value / scale.gather(0, code.atoms.flatten()).view_as(code.value)
    return SparseCode(code.basis * scale[:, None], value, code.atoms)


def _start(matrix: Tensor, rank: int, count: int, metric: Tensor | None, seed: int) -> Tensor:
    """(rank, in): an orthonormal basis turned towards sparse coefficients; the rest is drawn."""
    outputs = output_basis(matrix, min(matrix.shape), metric, seed=seed)
    rows = outputs.T @ matrix  # (k, in)
    energy = _dot(rows, rows, metric).diagonal().clamp(min=0)
    alive = energy > energy.max() * torch.finfo(energy.dtype).eps ** 0.5
    rows = rows[alive] / energy[alive].sqrt()[:, None]
    kept = min(rank, len(rows))
    products = _dot(matrix, rows, metric)  # (out, k)
    turn = torch.eye(kept, len(rows), dtype=matrix.dtype, device=matrix.device)
    before = None
    for _ in range(TURNS if count < kept else 0):
        turned = products @ turn.T
        index = turned.abs().topk(count, dim=1).indices.sort(1).values
        if before is not None and torch.equal(index, before):
            break
        before = index
        sparse = spread(turned.gather(1, index), index, kept)
        left, _, right = torch.linalg.svd(sparse.T @ products, full_matrices=False)
        turn = left @ right
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rank - kept, matrix.shape[1], generator=generator, dtype=matrix.dtype)
    return torch.cat([turn @ rows, drawn.to(matrix.device)])


def _far_rows(matrix: Tensor, basis: Tensor, metric: Tensor | None) -> Tensor:
    """`basis` (r, in), its first atoms replaced by rows of W: each the farthest from those before.

    Of rows that lie on r lines, one on each is found.
    """
    left, rows = _dot(matrix, matrix, metric), []
    least = left.diagonal().max() * torch.finfo(left.dtype).eps ** 0.5
    for _ in range(min(len(basis), len(matrix))):
        far = int(left.diagonal().argmax())
        if not left[far, far] > least:
            break
        rows.append(far)
        left = left - torch.outer(left[:, far], left[far]) / left[far, far]
    return torch.cat([matrix[rows], basis[len(rows) :]])


def _coded(
    matrix: Tensor, basis: Tensor, metric: Tensor | None, count: int, rounds: int | None
) -> tuple[SparseCode, float]:
    """The coefficients on a basis, its atoms made unit, and the squared error that they leave."""
    length = _dot(basis, basis, metric).diagonal().clamp(min=0).sqrt()
    basis = basis / length.where(length > 0, 1)[:, None]
    products, gram = _dot(matrix, basis, metric), _dot(basis, basis, metric)
    value, index = pursuit(products, gram, count, rounds=rounds)
    rest = matrix - spread(value, index, len(basis)) @ basis
    return SparseCode(basis, value, index), float(_dot(rest, rest, metric).diagonal().sum())


def _refreshed(matrix: Tensor, code: SparseCode, metric: Tensor | None) -> Tensor:
    """The least-squares basis; atoms without a row become the rows that were met worst."""
    coefficients = code.coefficients()
    basis = _least_squares(matrix, coefficients)
    dead = (coefficients.abs().amax(0) == 0).nonzero()[:, 0]
    if len(dead):
        rest = matrix - coefficients @ basis
        worst = _dot(rest, rest, metric).diagonal().argsort(descending=True, stable=True)
        dead = dead[: len(worst)]
        fresh = rest[worst[: len(dead)]]
        some = fresh.norm(dim=1, keepdim=True) > 0
        basis[dead] = torch.where(some, fresh, code.basis[dead])
    return basis


def _least_squares(matrix: Tensor, coefficients: Tensor) -> Tensor:
    """(CᵀC)⁻¹ Cᵀ W by a Cholesky factor with a relative ridge; zero for atoms without a row."""
    normal = coefficients.T @ coefficients
    solved: Tensor = torch.cholesky_solve(coefficients.T @ matrix, safe_root(normal))
    return solved


def _on_support(products: Tensor, gram: Tensor, index: Tensor) -> Tensor:
    """Least squares of every row on its own atoms, (rows, s)."""
    found = []
    wanted = products.gather(1, index)[..., None]
    step = max(1, CHUNK // index.shape[1] ** 2)
    for some, right in zip(torch.split(index, step), torch.split(wanted, step), strict=True):
        parts = gram[some[:, :, None], some[:, None, :]]  # (rows, s, s)
        found.append(torch.cholesky_solve(right, safe_root(parts))[..., 0])
    return torch.cat(found)


def _dot(left: Tensor, right: Tensor, metric: Tensor | None) -> Tensor:
    """⟨left_i, right_j⟩ in the norm of the outputs."""
    return (left if metric is None else left @ metric) @ right.T
