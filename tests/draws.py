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
