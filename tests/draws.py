"""Numbers that tests draw: float64, from a seed of their own."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, columns), whose columns are."""
    return torch.linalg.qr(normal(rows, columns, seed=seed)).Q


def falling(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[Tensor, float]:
    """(rows, columns) of singular values 1/k, and how far the nearest matrix of a rank is."""
    side = min(rows, columns)
    values = torch.arange(1, side + 1, dtype=torch.float64).reciprocal()
    left, right = orthonormal(rows, side, seed), orthonormal(columns, side, seed + 100)
    return (left * values) @ right.T, float(values[rank:].square().sum()) ** 0.5
