"""Block matrices with shared bases (BLAST, arXiv 2410.21262): W_ij ≈ B_i diag(d_ij) C_j.

Blocks of one row share B_i, blocks of one column C_j, and each block adds only r numbers d_ij. A
single block is plain low rank; block-diagonal, block-low-rank and Monarch matrices are special
cases.

The factors are updated in turn by gradient steps, preconditioned with the factor's normal matrix
and damped by the size of the residual: cautious at first, close to Newton at the end. Step sizes
decay to zero; a least-squares fit of B comes last. If plain low rank of the same r is closer, it is
used instead. The authors' code uses no data. Here columns are scaled by the size of their inputs,
and the last fit is in the norm of the outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gram import bounded_fit, full_precision, safe_root, unit_of
from .svd import compute_dtype, factor

SWEEPS = 300
DAMP = 0.03  # times the norm of the residual
SMALL = 1e-3  # scale of the initial bases
FLOOR = 1e-3  # of the mean size of an input: columns of dead inputs are not divided by zero


class BlastFactors(NamedTuple):
    """Factors of a (b·p, b·q) matrix, in the compute dtype.

    Attributes:
        left: B (b, p, r).
        mix: d (b, b, r), by block row i and block column j.
        right: C (b, r, q).
    """

    left: Tensor
    mix: Tensor
    right: Tensor

    def product(self) -> Tensor:
        """(b·p, b·q)."""
        return blast_product(*self)


def blast_product(left: Tensor, mix: Tensor, right: Tensor) -> Tensor:
    """The matrix (b·p, b·q) of the factors (b, p, r), (b, b, r), (b, r, q)."""
    rows = mix[..., None] * right  # (b, b, r, q): diag(d_ij) C_j
    rows = rows.transpose(1, 2).flatten(2)  # (b, r, b·q)
    return (left @ rows).flatten(0, 1)


def padded(weight: Tensor, blocks: int) -> Tensor:
    """W, zero-padded to multiples of `blocks` on both sides."""
    rows, columns = (-side % blocks for side in weight.shape)
    return torch.nn.functional.pad(weight, (0, columns, 0, rows))


def blast_factors(
    weight: Tensor,
    blocks: int,
    rank: int,
    gram: Tensor | None = None,
    *,
    sweeps: int = SWEEPS,
    seed: int = 0,
) -> BlastFactors:
    """BLAST factors of W, zero-padded where `blocks` does not divide a side.

    Args:
        weight: W (out, in).
        blocks: b ≥ 1, per side.
        rank: r ≥ 1.
        gram: H (in, in), or None for the identity.
        sweeps: over the three factors.
        seed: of the random start.
    """
    dtype = compute_dtype(min(weight.shape))
    matrix = padded(weight.detach().to(dtype), blocks)
    matrix = matrix / (unit := unit_of(matrix))
    metric = None if gram is None else gram.to(matrix)
    with full_precision(matrix):
        factors = bounded_fit(
            matrix,
            metric,
            lambda gram: _best(matrix, blocks, rank, gram, sweeps, seed),
            lambda factors: [factors.product()],
        )
        return _even(factors._replace(left=factors.left * unit))


def _best(
    matrix: Tensor, blocks: int, rank: int, gram: Tensor | None, sweeps: int, seed: int
) -> BlastFactors:
    """The better of the fitted factors and plain low rank, of a padded matrix."""
    scale = _column_scale(gram, matrix)
    scaled = matrix * scale
    size = scaled.square().mean().sqrt()
    size = size if float(size) > 0 else torch.ones_like(size)
    cells = _cells(scaled / size, blocks)  # (b, b, p, q)
    factors = _start(cells, rank, seed)
    for sweep in range(sweeps):
        factors = _swept(cells, factors, 1 - sweep / sweeps)
    right = factors.right / scale.view(blocks, 1, -1)
    metric = None if gram is None else _padded_gram(gram, matrix)
    left = _fitted(matrix, factors.mix, right, metric)
    fitted = BlastFactors(left, factors.mix, right)
    plain = _low_rank(matrix, blocks, rank, metric, seed)
    if plain is not None and _error(matrix, plain, metric) <= _error(matrix, fitted, metric):
        return plain
    return fitted


def _swept(cells: Tensor, factors: BlastFactors, step: float) -> BlastFactors:
    """One preconditioned step of each factor."""
    left, mix, right = factors
    across = (mix[..., None] * right).transpose(1, 2).flatten(2)  # (b, r, b·q)
    rows = cells.transpose(1, 2).flatten(2)  # (b, p, b·q)
    residual = rows - left @ across
    normal = across @ across.mT
    left = left + step * _conditioned(normal, residual, (residual @ across.mT).mT).mT
    down = (mix[:, :, None] * left[:, None]).transpose(0, 1).flatten(1, 2)  # (b, b·p, r)
    columns = cells.permute(1, 0, 2, 3).flatten(1, 2)  # (b, b·p, q)
    residual = columns - down @ right
    right = right + step * _conditioned(down.mT @ down, residual, down.mT @ residual)
    residual = cells - (left[:, None] * mix[:, :, None]) @ right
    gradient = ((left.mT[:, None] @ residual) * right).sum(-1)  # (b, b, r)
    normal = (left.mT @ left)[:, None] * (right @ right.mT)
    mix = mix + step * _conditioned(normal, residual, gradient[..., None])[..., 0]
    return BlastFactors(left, mix, right)


def _conditioned(normal: Tensor, rest: Tensor, gradient: Tensor) -> Tensor:
    """(normal + δ‖residual‖ I)⁻¹ gradient, for batches of (r, r) and (r, k)."""
    root = safe_root(normal, DAMP * rest.norm())
    solved: Tensor = torch.cholesky_solve(gradient, root)
    return solved


def _fitted(matrix: Tensor, mix: Tensor, right: Tensor, metric: Tensor | None) -> Tensor:
    """The least-squares B (b, p, r) in the norm of the outputs."""
    across = (mix[..., None] * right).transpose(1, 2).flatten(2)  # (b, r, b·q)
    weighted = across if metric is None else across @ metric
    normal = weighted @ across.mT
    rows = matrix.view(len(mix), -1, matrix.shape[1])
    solved: Tensor = torch.cholesky_solve((rows @ weighted.mT).mT, safe_root(normal))
    return solved.mT


def _low_rank(
    matrix: Tensor, blocks: int, rank: int, metric: Tensor | None, seed: int
) -> BlastFactors | None:
    """The best matrix of that rank as blocks with every d_ij = 1; None if the rank is too large.

    Gradient steps that start there cannot leave it; from elsewhere they may not reach it.
    """
    if rank > min(matrix.shape):
        return None
    up, down = factor(matrix, rank, metric, seed=seed)
    right = down.view(rank, blocks, -1).transpose(0, 1)
    return BlastFactors(up.view(blocks, -1, rank), up.new_ones(blocks, blocks, rank), right)


def _error(matrix: Tensor, factors: BlastFactors, metric: Tensor | None) -> float:
    residual = matrix - factors.product()
    return float(((residual if metric is None else residual @ metric) * residual).sum())


def _even(factors: BlastFactors) -> BlastFactors:
    """Scale each of the r components to equal norms in B and C, with |d| at most 1.

    A component spans all blocks, and so do its norms. Zero components are left unchanged.
    """
    left, mix, right = factors
    sides = left.square().sum((0, 1)).sqrt(), right.square().sum((0, 2)).sqrt()
    inner = mix.abs().amax((0, 1))
    alive = (sides[0] > 0) & (sides[1] > 0) & (inner > 0)
    inner = inner.where(alive, 1)
    target = (sides[0] * sides[1] * inner).sqrt()  # of both sides
    up = torch.where(alive, target / sides[0].where(alive, 1), 1)
    down = torch.where(alive, target / sides[1].where(alive, 1), 1)
    return BlastFactors(left * up, mix / inner, right * down[:, None])


def _cells(matrix: Tensor, blocks: int) -> Tensor:
    """The blocks (b, b, p, q) of a matrix (b·p, b·q)."""
    rows, columns = (side // blocks for side in matrix.shape)
    return matrix.view(blocks, rows, blocks, columns).transpose(1, 2)


def _start(cells: Tensor, rank: int, seed: int) -> BlastFactors:
    generator = torch.Generator().manual_seed(seed)
    blocks, _, rows, columns = cells.shape

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(cells)

    small = SMALL * rank**-0.5
    return BlastFactors(
        small * drawn(blocks, rows, rank),
        drawn(blocks, blocks, rank),
        small * drawn(blocks, rank, columns),
    )


def _column_scale(gram: Tensor | None, matrix: Tensor) -> Tensor:
    """RMS of each input over their mean, floored, (b·q,); 1 without a Gram matrix."""
    if gram is None:
        return matrix.new_ones(matrix.shape[1])
    size = gram.diagonal().clamp(min=0).sqrt().to(matrix)
    size = size.clamp(min=float(FLOOR * size.mean()) or 1.0)
    size = size / size.mean()
    return torch.nn.functional.pad(size, (0, matrix.shape[1] - len(size)), value=1.0)


def _padded_gram(gram: Tensor, matrix: Tensor) -> Tensor:
    more = matrix.shape[1] - len(gram)
    return torch.nn.functional.pad(gram.to(matrix), (0, more, 0, more))
