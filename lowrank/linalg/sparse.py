"""A dense basis with sparse coefficients: exactly s of r atoms in every row, or in every column.

The form W ≈ C · D is DSFormer's (arXiv 2312.13211), the algorithm ours: ADMM (admm.py) that also
learns the basis. The coefficients are split into a part that minimises the output error and one
with s entries per row; after each step D is refitted, with a penalty on its change, without which
it diverges. Neither the inputs' Gram matrix nor a root of it is ever inverted.

The start is an orthonormal basis of the outputs, rotated (orthogonal Procrustes) to minimise the
error of thresholding, as in COMPOT.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .admm import alternate, on_support
from .gram import bounded_fit, full_precision, safe_root, shifted_root, unit_of
from .svd import compute_dtype, output_basis

Side = Literal["out", "in"]

ITERATIONS = 80
WEAK, STRONG = 0.2, 1.0  # penalty that couples the two parts of C, at first and at last
HELD = 3.0  # penalty on a change of the basis, relative to its least squares
RUNAWAY = 1e3  # times the norm of the initial coefficients: there ADMM stops
POLISH = 3  # alternating fits of values and basis on the final support
TURNS = 30  # Procrustes rotations of the start, at most
CHUNK = 2**24  # entries of per-row Gram matrices at once
ROUNDS = 8  # of a pursuit: updates of the residual


class SparseCode(NamedTuple):
    """A matrix (a, b) ≈ Σ_t value[:, t] · basis[atoms[:, t]].

    Attributes:
        basis: D (r, b), in the compute dtype.
        value: (a, s).
        atoms: (a, s) int64, ascending in each row.
    """

    basis: Tensor
    value: Tensor
    atoms: Tensor

    def coefficients(self) -> Tensor:
        """C (a, r)."""
        return spread(self.value, self.atoms, len(self.basis))


class _Problem(NamedTuple):
    """min ‖L^½ (T − C D) R^½‖; a metric None is the identity."""

    target: Tensor
    left: Tensor | None
    right: Tensor | None

    def error(self, coefficients: Tensor, basis: Tensor) -> float:
        residual = self.target - coefficients @ basis
        return float((self.weighed(residual, self.right) * self.of_rows(residual)).sum())

    def of_rows(self, matrix: Tensor) -> Tensor:
        return matrix if self.left is None else self.left @ matrix

    @staticmethod
    def weighed(matrix: Tensor, metric: Tensor | None) -> Tensor:
        return matrix if metric is None else matrix @ metric

    def dot(self, one: Tensor, other: Tensor) -> Tensor:
        """⟨one_i, other_j⟩ of rows, in the metric R."""
        return self.weighed(one, self.right) @ other.T

    def unit(self, basis: Tensor) -> Tensor:
        """Norms of the atoms (r,), 1 for zero atoms."""
        size = (self.weighed(basis, self.right) * basis).sum(1).clamp(min=0).sqrt()
        return size.where(size > 0, 1)


def spread(value: Tensor, index: Tensor, rank: int) -> Tensor:
    """The matrix (out, r) with `value` (out, s) in columns `index` (out, s)."""
    return value.new_zeros(len(value), rank).scatter(1, index, value)


def pursuit(
    products: Tensor, gram: Tensor, count: int, *, rounds: int | None = None
) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit, batched over rows: least squares on `count` atoms each.

    Args:
        products: ⟨w_i, d_j⟩ (rows, r) of the rows with the atoms.
        gram: ⟨d_i, d_j⟩ (r, r) of the atoms.
        count: s in [1, r].
        rounds: number of rounds, each of which adds s / rounds atoms by their products with the
            residual; None: one at a time, as in the textbook. Each round costs a solve per row.

    Returns:
        value, index: (rows, s); index ascending, no atom twice.
    """
    rows, rank = products.shape
    rounds = min(count, rounds or count)
    size = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
    chosen = products.new_zeros(rows, rank, dtype=torch.bool)
    index = products.new_zeros(rows, 0, dtype=torch.int64)
    residual = products
    for number in range(1, rounds + 1):
        more = count * number // rounds - index.shape[1]
        score = (residual.square() / size).masked_fill(chosen, -1.0)
        added = score.topk(more, dim=1, sorted=False).indices
        chosen.scatter_(1, added, True)
        index = torch.cat([index, added], 1).sort(1).values
        value = _on_support(products, gram, index)
        residual = products - spread(value, index, rank) @ gram
    return value, index


def dense_sparse_code(
    weight: Tensor,
    rank: int,
    count: int,
    gram: Tensor | None = None,
    *,
    side: Side = "out",
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> SparseCode:
    """C and D that approximately minimise ‖(W − C D) H^½‖, or ‖(W − (C D)ᵀ) H^½‖.

    Args:
        weight: W (out, in).
        rank: r ≥ 1, the number of atoms; it may exceed min(out, in).
        count: s in [1, r], per output or per input.
        gram: H (in, in), or None for the identity.
        side: "out": every row of W has s coefficients, C is (out, r) and D (r, in). "in": every
            column has, and the code is that of Wᵀ, C (in, r) and D (r, out).
        iterations: of ADMM; 0 keeps the support of the thresholded start.
        seed: of the random atoms beyond the rank of W.

    Returns:
        The better of the start and the result of ADMM, both after alternating fits of values and
        basis; balanced.
    """
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    matrix = matrix / (unit := unit_of(matrix))

    def fit(metric: Tensor | None) -> SparseCode:
        problem = _Problem(matrix, None, metric)
        if side == "in":
            problem = _Problem(matrix.T, metric, None)
        return _best(problem, rank, count, iterations, seed)

    with full_precision(matrix):
        metric = None if gram is None else gram.to(matrix)
        code = bounded_fit(matrix, metric, fit, lambda code: [code.coefficients() @ code.basis])
        return balanced(code._replace(value=code.value * unit))


def _best(problem: _Problem, rank: int, count: int, iterations: int, seed: int) -> SparseCode:
    """The code of least error among those of several starts."""
    basis = _start(problem, rank, count, seed)
    candidates = [_thresholded(problem, basis, count)]
    if count == 1:  # clustering of rows by line, which a bad start cannot recover
        candidates.append(_thresholded(problem, _far_rows(problem, basis), count))
    if iterations:
        candidates.append(_alternated(problem, basis, count, iterations))
    polished = [_polished(problem, *candidate) for candidate in candidates]
    _, basis, coefficients, index = min(polished, key=itemgetter(0))
    return SparseCode(basis, coefficients.gather(1, index), index)


def balanced(code: SparseCode) -> SparseCode:
    """Scale every atom to the norm of its column of coefficients; an unused atom to norm 1."""
    coefficients = code.coefficients()
    up, down = coefficients.norm(dim=0), code.basis.norm(dim=1)
    alive = (up > 0) & (down > 0)
    scale = torch.where(alive, (up / down.where(alive, 1)).sqrt(), 1 / down.where(down > 0, 1))
    value = code.value / scale.gather(0, code.atoms.flatten()).view_as(code.value)
    return SparseCode(code.basis * scale[:, None], value, code.atoms)


def _start(problem: _Problem, rank: int, count: int, seed: int) -> Tensor:
    """(rank, b): an orthonormal basis rotated towards sparse coefficients, then random atoms."""
    target = problem.target
    if problem.left is None:
        outputs = output_basis(target, min(target.shape), problem.right, seed=seed)
        rows = outputs.T @ target  # (k, b)
    else:
        rows = output_basis(target.T, min(target.shape), problem.left, seed=seed).T
    energy = problem.dot(rows, rows).diagonal().clamp(min=0)
    alive = energy > energy.max() * torch.finfo(energy.dtype).eps ** 0.5
    rows = rows[alive] / energy[alive].sqrt()[:, None]
    kept = min(rank, len(rows))
    products = problem.dot(target, rows)  # (a, k)
    weighed = problem.of_rows(products)
    rotation = torch.eye(kept, len(rows), dtype=target.dtype, device=target.device)
    previous = None
    for _ in range(TURNS if count < kept else 0):
        rotated = products @ rotation.T
        index = rotated.abs().topk(count, dim=1).indices.sort(1).values
        if previous is not None and torch.equal(index, previous):
            break
        previous = index
        sparse = spread(rotated.gather(1, index), index, kept)
        left, _, right = torch.linalg.svd(sparse.T @ weighed, full_matrices=False)
        rotation = left @ right
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rank - kept, target.shape[1], generator=generator, dtype=target.dtype)
    basis = torch.cat([rotation @ rows, drawn.to(target.device)])
    return basis / problem.unit(basis)[:, None]


def _far_rows(problem: _Problem, basis: Tensor) -> Tensor:
    """`basis` (r, b), its first atoms replaced by rows of T: each the farthest from those before.

    Finds one row on each line if all rows lie on r lines.
    """
    residual, rows = problem.dot(problem.target, problem.target), []
    least = residual.diagonal().max() * torch.finfo(residual.dtype).eps ** 0.5
    for _ in range(min(len(basis), len(residual))):
        far = int(residual.diagonal().argmax())
        if not residual[far, far] > least:
            break
        rows.append(far)
        residual = residual - torch.outer(residual[:, far], residual[far]) / residual[far, far]
    basis = torch.cat([problem.target[rows], basis[len(rows) :]])
    return basis / problem.unit(basis)[:, None]


def _thresholded(problem: _Problem, basis: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The basis of unit atoms, and each row's `count` largest products with it, (a, r)."""
    return basis, *_largest(problem.dot(problem.target, basis), count)


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row, the others zero, and their columns."""
    index = matrix.abs().topk(count, dim=1).indices.sort(1).values
    return spread(matrix.gather(1, index), index, matrix.shape[1]), index


def _alternated(
    problem: _Problem, basis: Tensor, count: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Basis, C (a, r) and its support (a, s), by ADMM from a basis of unit atoms."""
    sparse, index = _largest(problem.dot(problem.target, basis), count)
    blocks, most = _Blocks(problem, basis, count), RUNAWAY * float(sparse.norm())
    sparse, index = alternate(
        blocks, sparse, index, iterations=iterations, weak=WEAK, strong=STRONG, most=most
    )
    return blocks.basis, sparse, index


class _Blocks:
    """ADMM blocks: C, free and with `count` entries a row, and the basis D (r, b) of unit atoms."""

    def __init__(self, problem: _Problem, basis: Tensor, count: int) -> None:
        self.problem, self.basis, self.count = problem, basis, count
        self.whole = problem.of_rows(problem.weighed(problem.target, problem.right))
        self.own = None if problem.left is None else torch.linalg.eigh(problem.left)

    def free(self, sparse: Tensor, dual: Tensor, rho: float) -> Tensor:
        """Solve L C G + ρ C = L T R Dᵀ − Y + ρ S, with G = D R Dᵀ, for C.

        Without L that is one solve for all rows; otherwise the eigenbases of L and G decouple it.
        """
        pull = self.whole @ self.basis.T - dual + rho * sparse
        gram = self.problem.dot(self.basis, self.basis)
        if self.own is None:
            root, _ = shifted_root(gram, gram.new_tensor([rho]))
            solved: Tensor = torch.cholesky_solve(pull.T, root).T
            return solved
        power, turn = self.own
        bent, axes = torch.linalg.eigh(gram)
        inner = (turn.T @ pull @ axes) / (power.clamp(min=0)[:, None] * bent.clamp(min=0) + rho)
        free: Tensor = turn @ inner @ axes.T
        return free

    def project(self, wish: Tensor) -> tuple[Tensor, Tensor]:
        return _largest(wish, self.count)

    def follow(self, sparse: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        """Refit the basis with a penalty on its change; C takes the norms of the atoms."""
        basis = _least_squares(self.problem, sparse, self.basis, HELD)
        length = self.problem.unit(basis)
        self.basis = basis / length[:, None]
        return sparse * length, dual / length


def _polished(
    problem: _Problem, basis: Tensor, sparse: Tensor, index: Tensor
) -> tuple[float, Tensor, Tensor, Tensor]:
    """The error, basis, C and support, after alternating fits of C and basis on this support."""
    mask = torch.zeros_like(sparse, dtype=torch.bool).scatter(1, index, True)
    for _ in range(POLISH):
        sparse = _on_mask(problem, basis, sparse, mask)
        basis = _least_squares(problem, sparse, basis)
    return problem.error(sparse, basis), basis, sparse, index


def _on_mask(problem: _Problem, basis: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """C (a, r) on the mask with less error, by conjugate gradients from `start`."""
    gram = problem.dot(basis, basis)
    diagonal = gram.diagonal().expand_as(start)
    if problem.left is not None:
        diagonal = diagonal * problem.left.diagonal()[:, None]
    slope = problem.of_rows(problem.dot(problem.target, basis) - start @ gram)
    return on_support(
        start, slope, lambda c: problem.of_rows(c @ gram), mask, diagonal, apart=False
    )


def _least_squares(
    problem: _Problem, coefficients: Tensor, basis: Tensor, held: float = 0.0
) -> Tensor:
    """(CᵀLC)⁻¹ CᵀL T, which does not depend on R, by Cholesky with a relative ridge.

    Atoms without coefficients stay as they are in `basis`; `held` penalises changes of the others,
    relative to their size.
    """
    weighed = problem.of_rows(coefficients)
    normal, wanted = coefficients.T @ weighed, weighed.T @ problem.target
    size = normal.diagonal().clamp(min=0)
    alive = size > size.max() * torch.finfo(size.dtype).eps
    scale = size.where(alive, 1).sqrt()
    normal = normal / scale / scale[:, None] * alive * alive[:, None]
    normal.diagonal().copy_(torch.ones_like(size) + held)
    right = wanted / scale[:, None] + held * scale[:, None] * basis
    solved = torch.cholesky_solve(right, safe_root(normal)) / scale[:, None]
    return solved.where(alive[:, None], basis)


def _on_support(products: Tensor, gram: Tensor, index: Tensor) -> Tensor:
    """Coefficients (rows, s) of the least squares of each row on its own atoms."""
    solved = []
    wanted = products.gather(1, index)[..., None]
    step = max(1, CHUNK // index.shape[1] ** 2)
    for atoms, right in zip(torch.split(index, step), torch.split(wanted, step), strict=True):
        parts = gram[atoms[:, :, None], atoms[:, None, :]]  # (rows, s, s)
        solved.append(torch.cholesky_solve(right, safe_root(parts))[..., 0])
    return torch.cat(solved)
