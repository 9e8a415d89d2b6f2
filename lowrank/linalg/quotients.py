"""The nearest tables Q (⌈V/m⌉, ·) and R (m, ·) to a table of V rows, e_i ≈ Q[i // m] ∘ R[i mod m].

Read as ⌈V/m⌉ × m cells, every column of the table is a matrix: a product of Q and R is of rank one,
so that its nearest one is the leading pair of singular vectors; a sum has row and column means.
Where m does not divide V the last row of cells is short: R is fitted to the whole rows, Q to all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def two_tables(table: Tensor, remainders: int, op: str, width: int) -> tuple[Tensor, Tensor]:
    """Q and R in float64, of the smallest squared error but for a short last row.

    For "mult" the entries of the table with fewer rows have mean square one, so that training moves
    the rows of the other as it would move those of the whole table; for "add" those of R have mean
    zero.

    Args:
        table: (V, D).
        remainders: m <= V.
        op: "mult", "add", or "concat", where R has the last `width` columns and Q the others.
    """
    table = table.detach().double()
    if op == "concat":
        left = table.shape[1] - width
        quotient = _means(table[:, :left], remainders)
        return quotient, _columns(table[:, left:], remainders)
    if op == "add":
        remainder = _columns(table, remainders)
        remainder = remainder - remainder.mean(0)
        ids = torch.arange(len(table), device=table.device)
        return _means(table - remainder[ids % remainders], remainders), remainder
    pairs = [_product(column, remainders) for column in table.T]
    return torch.stack([u for u, _ in pairs], 1), torch.stack([v for _, v in pairs], 1)


def _cells(table: Tensor, remainders: int) -> Tensor:
    """The whole rows of cells, (⌊V/m⌋, m, ...)."""
    whole = len(table) // remainders
    return table[: whole * remainders].reshape(whole, remainders, *table.shape[1:])


def _columns(table: Tensor, remainders: int) -> Tensor:
    """The mean of every remainder's rows, (m, ·)."""
    return _cells(table, remainders).mean(0)


def _means(table: Tensor, remainders: int) -> Tensor:
    """The mean of every quotient's rows, (⌈V/m⌉, ·)."""
    means, rest = _cells(table, remainders).mean(1), table[len(table) // remainders * remainders :]
    return torch.cat([means, rest.mean(0, keepdim=True)]) if len(rest) else means


def _product(column: Tensor, remainders: int) -> tuple[Tensor, Tensor]:
    """u (⌈V/m⌉) and v (m), with cells near u vᵀ."""
    cells = _cells(column, remainders)
    tall = len(cells) > remainders
    vector = torch.linalg.eigh(cells.T @ cells if tall else cells @ cells.T).eigenvectors[:, -1]
    right = vector if tall else cells.T @ vector
    size = right.norm()
    even = torch.full_like(right, remainders**-0.5)  # of a zero column
    right = torch.where(size > 0, right / size.clamp(min=1e-300), even)
    left = cells @ right
    rest = column[len(cells) * remainders :]
    if len(rest):
        some = right[: len(rest)]
        last = rest @ some / some.square().sum().clamp(min=1e-300)
        left = torch.cat([left, last[None]])
    return _scaled(left, right)


def _scaled(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the shorter of both of mean square one, and of a sum >= 0."""
    if len(left) > len(right):
        return _scaled(right, left)[::-1]
    size = left.square().mean().sqrt()
    size = size * torch.where(left.sum() < 0, -1.0, 1.0)
    if not bool(size):
        return torch.ones_like(left), torch.zeros_like(right)
    return left / size, right * size
