"""Second moments and the errors measured with them."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import full_precision


def gram_sum(rows: Tensor) -> Tensor:
    """Σ x xᵀ over the rows of (tokens, in): product in fp32 (fp64 stays), returned in float64.

    Chunks bound both the rounding of the fp32 sums and the memory of the cast.
    """
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    with full_precision(rows):  # hooks may run inside the caller's autocast
        for chunk in torch.split(rows, 8192):
            cast = chunk.to(wide)
            total += cast.T @ cast
    return total


def cross_sum(left: Tensor, right: Tensor) -> Tensor:
    """Σ x yᵀ over the rows of two (tokens, ·) tensors, summed as `gram_sum` does."""
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    with full_precision(left):
        for x, y in zip(torch.split(left, 8192), torch.split(right, 8192), strict=True):
            total += x.to(wide).T @ y.to(wide)
    return total


def squared_error(weight: Tensor, approximation: Tensor, gram: Tensor | None = None) -> float:
    """‖(W − Ŵ)H^½‖² in float64; H (in, in) None stands for the identity."""
    difference = weight.detach().double() - approximation.detach().double()
    if gram is None:
        return float(difference.square().sum())
    return float(((difference @ gram.to(difference)) * difference).sum().clamp(min=0))


def safe_root(normal: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """The Cholesky factor of (…, k, k) positive semi-definite matrices, singular or zero ones too.

    Args:
        shift: added to every diagonal, beside what rounding calls for.
    """
    side = normal.diagonal(dim1=-2, dim2=-1)
    ridge = side.amax(-1, keepdim=True) * (8 * side.shape[-1] * torch.finfo(normal.dtype).eps)
    ridge = ridge.clamp(min=torch.finfo(normal.dtype).tiny ** 0.5) + shift
    root: Tensor = torch.linalg.cholesky(normal + torch.diag_embed(ridge.expand_as(side)))
    return root
