"""Sums of rank-one blocks, and masks whose widths and places have gradients (arXiv 2310.18882).

W = Σ_k (m_k ∘ u_k)(m'_k ∘ v_k)ᵀ, each m a cyclic run of ones ("generalized block low-rank", GBLR).
A run among n entries, of width w and start l as fractions of n, has the Fourier coefficients

    m̂(f) = w sinc(f w) / sinc(f / n) · exp(−2πi f l + πi f (1/n − w)),   f = 0 … n/2,

which are smooth in w and l; a Gaussian exp(−f² / 2σ²) smoothes the mask itself. At whole n w and
n l, and σ = ∞, the mask is the run.

A weight is fitted in closed form, where the authors search greedily and then descend: the plane is
cut into b × b blocks, the largest singular values of all blocks together are kept as the budget
allows (the best choice for that grid), behind plain low rank of none, half or all of the budget;
the closest combination is taken. So it is never further from the weight than plain low rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .gram import full_precision
from .svd import compute_dtype

GRIDS = (2, 4, 8, 16)  # blocks per side
NARROW = 2  # the least width of a block
SHARES = (0.0, 0.5)  # of the budget for plain low rank, beside all of it


class BlockTerms(NamedTuple):
    """K rank-one blocks of a matrix (out, in).

    Attributes:
        up: u (out, K), zero off the blocks' rows.
        down: v (K, in), zero off the blocks' columns.
        starts: (2, K) int64, of rows and of columns.
        widths: (2, K) int64, so too.
    """

    up: Tensor
    down: Tensor
    starts: Tensor
    widths: Tensor

    @property
    def numbers(self) -> int:
        return int(self.widths.sum())


def run_mask(starts: Tensor, widths: Tensor, size: int) -> Tensor:
    """Cyclic runs among `size` entries: starts and widths (…), whole -> bool (…, size)."""
    places = torch.arange(size, device=starts.device)
    return (places - starts[..., None]).remainder(size) < widths[..., None]


def gaudi_mask(
    widths: Tensor, starts: Tensor, size: int, sigma: Tensor | float = math.inf
) -> Tensor:
    """The Gaussian-Dirichlet mask (…, size) of widths and starts (…), fractions of `size`.

    Args:
        sigma: σ > 0, in frequencies; the smaller, the smoother.
    """
    f = torch.arange(size // 2 + 1, dtype=widths.dtype, device=widths.device)
    w, start = widths[..., None], starts[..., None]
    height = w * torch.sinc(f * w) / torch.sinc(f / size) * torch.exp(-((f / sigma) ** 2) / 2)
    angle = torch.pi * f * (1 / size - w - 2 * start)
    # Not torch.polar, whose gradient takes a negative height for a turned angle.
    coefficients = torch.complex(height * angle.cos(), height * angle.sin())
    mask: Tensor = torch.fft.irfft(coefficients, size, norm="forward")
    return mask


def shrunk(widths: Tensor, threshold: float) -> Tensor:
    """The proximal step of widths in [0, 1]: soft-thresholded, and clipped."""
    return (widths - threshold).clamp(0, 1)


def whole_widths(widths: Tensor, sizes: Tensor) -> Tensor:
    """(2, K) fractions -> whole numbers of entries; zero on both sides where one side is empty.

    Args:
        sizes: (2, K) or (2, 1): how many rows and columns there are.
    """
    whole = (widths * sizes).round()
    return whole * (whole > 0).all(0)


def block_terms(weight: Tensor, limit: int) -> BlockTerms:
    """W (out, in) as rank-one blocks of at most `limit` numbers together, in the compute dtype.

    At least one term is given: that of the largest entry, if there is no room for another.
    """
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    grids = [b for b in GRIDS if b * NARROW <= min(matrix.shape)]
    with full_precision(matrix):
        best = _pooled(matrix, 1, limit)
        error = _error(matrix, best)
        for share in SHARES:
            plain = _pooled(matrix, 1, int(share * limit))
            rest = matrix - plain.up @ plain.down
            for grid in grids:
                tried = _joined(plain, _pooled(rest, grid, limit - plain.numbers))
                if (found := _error(matrix, tried)) < error:
                    best, error = tried, found
    return best if best.widths.shape[1] else _largest_entry(matrix)


def beyond_runs(matrix: Tensor, terms: BlockTerms) -> tuple[Tensor, Tensor]:
    """u (out, K) and v (K, in) of the terms, and off their runs what would fit W if a run grew.

    That is the least-squares continuation: the residual along the other side of the term.
    """
    rest = matrix.to(terms.up) - terms.up @ terms.down
    rows = run_mask(terms.starts[0], terms.widths[0], len(matrix)).T
    columns = run_mask(terms.starts[1], terms.widths[1], matrix.shape[1])
    tiny = torch.finfo(rest.dtype).tiny
    v = rest @ terms.down.T / terms.down.square().sum(1).clamp(min=tiny)
    u = (terms.up.T @ rest) / terms.up.square().sum(0).clamp(min=tiny)[:, None]
    return torch.where(rows, terms.up, v), torch.where(columns, terms.down, u)


def _pooled(matrix: Tensor, grid: int, limit: int) -> BlockTerms:
    """The best terms within the blocks of a grid: all their singular values compete."""
    edges = [[len(part) for part in torch.arange(n).tensor_split(grid)] for n in matrix.shape]
    parts: list[tuple[tuple[int, int], Tensor, Tensor]] = []
    found: list[tuple[float, int, int, int]] = []  # energy a number, numbers, part, component
    for i, rows in enumerate(torch.split(matrix, edges[0], 0)):
        for j, block in enumerate(torch.split(rows, edges[1], 1)):
            u, values, v = torch.linalg.svd(block, full_matrices=False)
            place = sum(edges[0][:i]), sum(edges[1][:j])
            root, numbers = values.sqrt(), sum(block.shape)
            gains = values.square().div(numbers).tolist()
            found += [(gain, numbers, len(parts), k) for k, gain in enumerate(gains)]
            parts.append((place, u * root, root[:, None] * v))
    found.sort(key=lambda term: -term[0])
    kept, left = [], limit
    for gain, numbers, part, k in found:
        if gain > 0 and numbers <= left:
            place, u, v = parts[part]
            kept.append((place, u[:, k], v[k]))
            left -= numbers
    return _placed(matrix, kept)


def _placed(matrix: Tensor, parts: list[tuple[tuple[int, int], Tensor, Tensor]]) -> BlockTerms:
    """Terms from their places and their two vectors."""
    up = matrix.new_zeros(len(matrix), len(parts))
    down = matrix.new_zeros(len(parts), matrix.shape[1])
    starts = torch.zeros(2, len(parts), dtype=torch.int64, device=matrix.device)
    widths = torch.zeros_like(starts)
    for k, ((row, column), u, v) in enumerate(parts):
        up[row : row + len(u), k] = u
        down[k, column : column + len(v)] = v
        starts[0, k], starts[1, k] = row, column
        widths[0, k], widths[1, k] = len(u), len(v)
    return BlockTerms(up, down, starts, widths)


def _joined(first: BlockTerms, second: BlockTerms) -> BlockTerms:
    return BlockTerms(
        torch.cat([first.up, second.up], 1),
        torch.cat([first.down, second.down]),
        torch.cat([first.starts, second.starts], 1),
        torch.cat([first.widths, second.widths], 1),
    )


def _largest_entry(matrix: Tensor) -> BlockTerms:
    row, column = divmod(int(matrix.abs().argmax()), matrix.shape[1])
    value = matrix[row, column][None]
    root = value.abs().sqrt()
    return _placed(matrix, [((row, column), root, root * value.sign())])


def _error(matrix: Tensor, terms: BlockTerms) -> float:
    return float((matrix - terms.up @ terms.down).square().sum())
