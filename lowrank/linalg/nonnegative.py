"""Non-negative matrix factorisation: A ≈ maps · parts, all three non-negative.

Multiplicative updates for the squared error (Lee and Seung, NIPS 2000): maps ← maps · (A partsᵀ) /
(maps parts partsᵀ), and the same for the parts. No update raises the error. The start is random,
|N(0, 1)| · √(mean / rank). For a matrix with negative numbers there is `semi_nmf`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import LowrankError
from .gram import full_precision
from .svd import compute_dtype

ITERATIONS = 200
STOP = 1e-4  # of the first error: least decrease in ten iterations
LOOK = 10


def nmf(
    matrix: Tensor,
    rank: int,
    *,
    iterations: int = ITERATIONS,
    tolerance: float = STOP,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Non-negative factors of A.

    Args:
        matrix: A (rows, features) ≥ 0, floating.
        rank: at least 1.
        tolerance: the updates end when ten of them lower the error by less than this share of the
            first error.

    Returns:
        maps (rows, rank) and parts (rank, features) ≥ 0 in the compute dtype. Parts have norm 1, or
        are zero, and come in the order of their maps' energy, descending.

    Raises:
        LowrankError: a number is negative or not finite, or the rank is below 1.
    """
    if rank < 1:
        raise LowrankError(f"rank must be at least 1, got {rank}")
    if not bool(torch.isfinite(matrix).all()) or bool((matrix < 0).any()):
        raise LowrankError("nmf takes finite numbers >= 0: use semi_nmf for others")
    a = matrix.detach().to(compute_dtype(min(matrix.shape)))
    with full_precision(a):
        return _ordered(*_updated(a, *_start(a, rank, seed), iterations, tolerance))


def relative_error(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """‖A − left·right‖_F / ‖A‖_F; 0 for the zero matrix."""
    total = float(matrix.double().norm())
    return float((matrix.to(left) - left @ right).double().norm()) / total if total > 0 else 0.0


def _start(a: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = float(a.mean() / rank) ** 0.5
    shapes = ((len(a), rank), (rank, a.shape[1]))
    maps, parts = (torch.randn(s, generator=generator, dtype=a.dtype).abs() * scale for s in shapes)
    return maps.to(a.device), parts.to(a.device)


def _updated(
    a: Tensor, maps: Tensor, parts: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    tiny = torch.finfo(a.dtype).tiny
    energy = float(a.square().sum())
    first = before = _error(a, maps, parts, energy)
    for number in range(1, iterations + 1):
        maps = maps * (a @ parts.T) / (maps @ (parts @ parts.T) + tiny)
        parts = parts * (maps.T @ a) / ((maps.T @ maps) @ parts + tiny)
        if number % LOOK == 0:
            now = _error(a, maps, parts, energy)
            if before - now <= tolerance * first:
                break
            before = now
    return maps, parts


def _error(a: Tensor, maps: Tensor, parts: Tensor, energy: float) -> float:
    """‖A − maps·parts‖_F, without forming the product."""
    crossed = float(((maps.T @ a) * parts).sum())
    own = float(((maps.T @ maps) * (parts @ parts.T)).sum())
    return math.sqrt(max(energy - 2 * crossed + own, 0.0))


def _ordered(maps: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    norms = parts.norm(dim=1)
    maps, parts = maps * norms, parts / norms.clamp(min=torch.finfo(parts.dtype).tiny)[:, None]
    order = maps.square().sum(0).argsort(descending=True, stable=True)
    return maps[:, order], parts[order]
