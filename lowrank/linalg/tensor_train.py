"""Tables as tensor trains, by TT-SVD (Oseledets, SIAM J. Sci. Comput. 33, 2011).

A table (V, D), filled up with zero rows to n₁n₂n₃, is read as a tensor of three indices, the k-th
of which has n_k values of an id's digit and d_k of a column's:

    E[(i₁ i₂ i₃), (j₁ j₂ j₃)] ≈ G₁[i₁, j₁, :] · G₂[i₂, :, j₂, :] · G₃[i₃, :, j₃].

TT-SVD takes the leading left vectors of the first unfolding, and the leading right ones of what
they leave: its squared error is the sum of both tails, at most twice the least of these ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Sides = tuple[int, int, int]
Ranks = tuple[int, int]


def row_sides(rows: int) -> Sides:
    """n₁ ≥ n₂ ≥ n₃ near the cube root, whose product is `rows` or little more."""
    first = 1
    while first**3 < rows:
        first += 1
    rest = -(-rows // first)
    second = math.isqrt(rest - 1) + 1
    return first, second, -(-rest // second)


def column_sides(columns: int) -> Sides:
    """d₁, d₂, d₃ of product `columns`, as even as they can be; d₂, which R² is multiplied by, is
    the least."""
    least, middle = min(
        ((a, b) for a in _divisors(columns) for b in _divisors(columns // a)),
        key=lambda pair: (pair[0] + pair[1] + columns // (pair[0] * pair[1]), pair),
    )
    a, b, c = sorted((least, middle, columns // (least * middle)))
    return b, a, c


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def most_ranks(rows: Sides, columns: Sides) -> Ranks:
    """Beyond these ranks nothing is gained."""
    first, middle, last = (n * d for n, d in zip(rows, columns, strict=True))
    return min(first, middle * last), min(last, first * middle)


def tt_cores(
    table: Tensor, rows: Sides, columns: Sides, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """G₁ (n₁, d₁, R₁), G₂ (n₂, R₁, d₂, R₂) and G₃ (n₃, R₂, d₃) in float64, balanced: at both cuts
    the roots of the singular values are on either side.

    Args:
        table: (V, D), V at most the product of `rows`, D that of `columns`.
        ranks: R₁ and R₂, at most `most_ranks`.
    """
    unfolded = _unfolded(table, rows, columns)  # (n₁ d₁, n₂ d₂ n₃ d₃)
    left = _leading(unfolded @ unfolded.T, ranks[0])
    inner = left.T @ unfolded
    at_left = inner.norm(dim=1)
    folded = inner.reshape(-1, rows[2] * columns[2])  # (R₁ n₂ d₂, n₃ d₃)
    right = _leading(folded.T @ folded, ranks[1])
    middle = folded @ right
    at_right = middle.norm(dim=0)
    one, two = _roots(at_left), _roots(at_right)
    middle = middle.view(ranks[0], rows[1], columns[1], ranks[1]) / one[:, None, None, None] / two
    return (
        (left * one).view(rows[0], columns[0], ranks[0]),
        middle.transpose(0, 1).contiguous(),
        (right * two).view(rows[2], columns[2], ranks[1]).transpose(1, 2).contiguous(),
    )


def tt_errors(table: Tensor, rows: Sides, columns: Sides, ranks: Iterable[Ranks]) -> list[float]:
    """Squared errors of `tt_cores` at these ranks, R₁ not falling; one decomposition of n₁d₁, and
    one of n₃d₃ for each."""
    unfolded = _unfolded(table, rows, columns)
    total = float(unfolded.square().sum())
    left = _leading(unfolded @ unfolded.T, most_ranks(rows, columns)[0])
    inner = (left.T @ unfolded).view(left.shape[1], -1, rows[2] * columns[2])
    kept, moment, errors = 0, unfolded.new_zeros(inner.shape[2], inner.shape[2]), []
    for first, last in ranks:
        more = inner[kept:first].flatten(0, 1)
        moment, kept = moment + more.T @ more, max(first, kept)
        energies = torch.linalg.eigvalsh(moment)[-last:]
        errors.append(max(total - float(energies.sum()), 0.0))
    return errors


def tt_table(first: Tensor, middle: Tensor, last: Tensor) -> Tensor:
    """The table (n₁n₂n₃, d₁d₂d₃) of three cores."""
    whole = torch.einsum("ajr,brks->abjks", first, middle)
    return torch.einsum("abjks,csl->abcjkl", whole, last).flatten(3).flatten(0, 2)


def _unfolded(table: Tensor, rows: Sides, columns: Sides) -> Tensor:
    table = table.detach().double()
    missing = math.prod(rows) - len(table)
    if missing:
        table = torch.cat([table, table.new_zeros(missing, table.shape[1])])
    return table.view(*rows, *columns).permute(0, 3, 1, 4, 2, 5).reshape(rows[0] * columns[0], -1)


def _leading(moment: Tensor, count: int) -> Tensor:
    """The eigenvectors of the `count` largest eigenvalues, in columns, the largest first."""
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors[:, -count:].flip(1)


def _roots(sizes: Tensor) -> Tensor:
    """Of the sizes; of those that are rounding, one."""
    floor = 1e-12 * float(sizes.max()) if len(sizes) else 0.0
    return torch.where(sizes > floor, sizes.clamp(min=1e-300).sqrt(), torch.ones_like(sizes))
