"""A dense basis with sparse coefficients: exactly s of r atoms in every row, or in every column.

DSFormer (arXiv 2312.13211) factors W ≈ C · D so; of it only the abstract was at hand, and what
follows is our own: an ADMM (admm.py) in which the basis is learned too. Coefficients are split into
a part that obeys the norm of the outputs and one that has s entries a row; after each exchange D is
refitted, held back towards what it was, for a basis that follows at once runs away. Neither the
inputs' Gram matrix nor a root of it is ever inverted.

The start is an orthonormal basis of the outputs, turned by Procrustes' rotation until thresholding
loses least (COMPOT does the same).
"""

from __future__ import annotations

from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .admm import alternate, on_support
from .gram import full_precision, safe_root
from .svd import compute_dtype, output_basis

Side = Literal["out", "in"]

ITERATIONS = 80
WEAK, STRONG = 0.2, 1.0  # how much the two parts of C are held together, at first and at last
HELD = 3.0  # how much a basis is held back, against the least squares that move it
RUNAWAY = 1e3  # times the norm of the start's coefficients: there the exchange ends
POLISH = 3  # times that basis and values are fitted to each other on the support found
TURNS = 30  # of the orthonormal start
CHUNK = 2**24  # numbers of the rows' own Gram matrices at once
ROUNDS = 8  # of a pursuit: so many times it looks at what is left


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
    """min ‖L^½ (T − C D) R^½‖; of the two metrics, None is the identity."""

    target: Tensor
    left: Tensor | None
    right: Tensor | None

    def error(self, coefficients: Tensor, basis: Tensor) -> float:
        rest = self.target - coefficients @ basis
        return float((self.weighed(rest, self.right) * self.of_rows(rest)).sum())

    def of_rows(self, matrix: Tensor) -> Tensor:
        return matrix if self.left is None else self.left @ matrix

    @staticmethod
    def weighed(matrix: Tensor, metric: Tensor | None) -> Tensor:
        return matrix if metric is None else matrix @ metric

    def dot(self, one: Tensor, other: Tensor) -> Tensor:
        """⟨one_i, other_j⟩ of rows, by R."""
        return self.weighed(one, self.right) @ other.T

    def unit(self, basis: Tensor) -> Tensor:
        """(r,): lengths of atoms, 1 of those that have none."""
        size = (self.weighed(basis, self.right) * basis).sum(1).clamp(min=0).sqrt()
        return size.where(size > 0, 1)


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
        further = score.topk(more, dim=1, sorted=False).indices
        chosen.scatter_(1, further, True)
        index = torch.cat([index, further], 1).sort(1).values
        value = _on_support(products, gram, index)
        left = products - spread(value, index, rank) @ gram
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
    """C and D of little error ‖(W − C D) H^½‖, or ‖(W − (C D)ᵀ) H^½‖.

    Args:
        weight: W (out, in).
        rank: r ≥ 1, the number of atoms; it may be above min(out, in).
        count: s in [1, r], of every output or of every input.
        gram: H (in, in), or None for the identity.
        side: "out": every row of W has s coefficients, C is (out, r) and D (r, in). "in": every
            column has, and the code is that of Wᵀ, C (in, r) and D (r, out).
        iterations: of ADMM; 0 keeps the support of the thresholded start.
        seed: of the atoms beyond the rank of W, which are drawn.

    Returns:
        The better of the start and what ADMM ends with, both with basis and values fitted to each
        other; both sides of the product equally long.
    """
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    metric = None if gram is None else gram.to(matrix)
    with full_precision(matrix):
        problem = _Problem(matrix, None, metric)
        if side == "in":
            problem = _Problem(matrix.T, metric, None)
        basis = _start(problem, rank, count, seed)
        candidates = [_thresholded(problem, basis, count)]
        if count == 1:  # rows are points on lines then, and a bad start stays bad
            candidates.append(_thresholded(problem, _far_rows(problem, basis), count))
        if iterations:
            candidates.append(_alternated(problem, basis, count, iterations))
        polished = [_polished(problem, *one) for one in candidates]
        _, basis, coefficients, index = min(polished, key=itemgetter(0))
        return balanced(SparseCode(basis, coefficients.gather(1, index), index))


def balanced(code: SparseCode) -> SparseCode:
    """Every atom as long as its column of coefficients; one that carries nothing keeps length 1."""
    coefficients = code.coefficients()
    up, down = coefficients.norm(dim=0), code.basis.norm(dim=1)
    alive = (up > 0) & (down > 0)
    scale = torch.where(alive, (up / down.where(alive, 1)).sqrt(), 1 / down.where(down > 0, 1))
    value = code.value / scale.gather(0, code.atoms.flatten()).view_as(code.value)
    return SparseCode(code.basis * scale[:, None], value, code.atoms)


def _start(problem: _Problem, rank: int, count: int, seed: int) -> Tensor:
    """(rank, b): an orthonormal basis turned towards sparse coefficients; the rest is drawn."""
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
    turn = torch.eye(kept, len(rows), dtype=target.dtype, device=target.device)
    before = None
    for _ in range(TURNS if count < kept else 0):
        turned = products @ turn.T
        index = turned.abs().topk(count, dim=1).indices.sort(1).values
        if before is not None and torch.equal(index, before):
            break
        before = index
        sparse = spread(turned.gather(1, index), index, kept)
        left, _, right = torch.linalg.svd(sparse.T @ weighed, full_matrices=False)
        turn = left @ right
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rank - kept, target.shape[1], generator=generator, dtype=target.dtype)
    basis = torch.cat([turn @ rows, drawn.to(target.device)])
    return basis / problem.unit(basis)[:, None]


def _far_rows(problem: _Problem, basis: Tensor) -> Tensor:
    """`basis` (r, b), its first atoms replaced by rows of T: each the farthest from those before.

    Of rows that lie on r lines, one on each is found.
    """
    left, rows = problem.dot(problem.target, problem.target), []
    least = left.diagonal().max() * torch.finfo(left.dtype).eps ** 0.5
    for _ in range(min(len(basis), len(left))):
        far = int(left.diagonal().argmax())
        if not left[far, far] > least:
            break
        rows.append(far)
        left = left - torch.outer(left[:, far], left[far]) / left[far, far]
    basis = torch.cat([problem.target[rows], basis[len(rows) :]])
    return basis / problem.unit(basis)[:, None]


def _thresholded(problem: _Problem, basis: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A basis of unit atoms, and of each row's products with it the `count` largest, (a, r)."""
    return basis, *_largest(problem.dot(problem.target, basis), count)


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The matrix without all but the `count` largest entries of a row, and where they are."""
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
    """C, free and with `count` entries a row, and the basis D (r, b) of unit atoms below it."""

    def __init__(self, problem: _Problem, basis: Tensor, count: int) -> None:
        self.problem, self.basis, self.count = problem, basis, count
        self.whole = problem.of_rows(problem.weighed(problem.target, problem.right))
        self.own = None if problem.left is None else torch.linalg.eigh(problem.left)
        self.eye = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)

    def free(self, sparse: Tensor, dual: Tensor, rho: float) -> Tensor:
        """L C G + ρ C = L T R Dᵀ − Y + ρ S with G = D R Dᵀ.

        Without L that is one solve for all rows; with it, L and G are diagonal together in the
        bases of both.
        """
        pull = self.whole @ self.basis.T - dual + rho * sparse
        gram = self.problem.dot(self.basis, self.basis)
        if self.own is None:
            root = torch.linalg.cholesky(gram + rho * self.eye)
            return torch.cholesky_solve(pull.T, root).T
        power, turn = self.own
        bent, axes = torch.linalg.eigh(gram)
        inner = (turn.T @ pull @ axes) / (power.clamp(min=0)[:, None] * bent.clamp(min=0) + rho)
        free: Tensor = turn @ inner @ axes.T
        return free

    def project(self, wish: Tensor) -> tuple[Tensor, Tensor]:
        return _largest(wish, self.count)

    def follow(self, sparse: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        """Refit the basis, held back; what the atoms lose in length C gains."""
        basis = _least_squares(self.problem, sparse, self.basis, HELD)
        length = self.problem.unit(basis)
        self.basis = basis / length[:, None]
        return sparse * length, dual / length


def _polished(
    problem: _Problem, basis: Tensor, sparse: Tensor, index: Tensor
) -> tuple[float, Tensor, Tensor, Tensor]:
    """The error, basis, C and support, after both were fitted to each other on this support."""
    mask = torch.zeros_like(sparse, dtype=torch.bool).scatter(1, index, True)
    for _ in range(POLISH):
        sparse = _on_mask(problem, basis, sparse, mask)
        basis = _least_squares(problem, sparse, basis)
    return problem.error(sparse, basis), basis, sparse, index


def _on_mask(problem: _Problem, basis: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """C (a, r) on the mask of less error, by conjugate gradients from `start`."""
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
    """(CᵀLC)⁻¹ CᵀL T, which no R changes, by a Cholesky factor with a relative ridge.

    An atom without coefficients stays as it is in `basis`; the others are drawn towards it by
    `held`, relative to their own size.
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
    """Least squares of every row on its own atoms, (rows, s)."""
    solved = []
    wanted = products.gather(1, index)[..., None]
    step = max(1, CHUNK // index.shape[1] ** 2)
    for some, right in zip(torch.split(index, step), torch.split(wanted, step), strict=True):
        parts = gram[some[:, :, None], some[:, None, :]]  # (rows, s, s)
        solved.append(torch.cholesky_solve(right, safe_root(parts))[..., 0])
    return torch.cat(solved)
