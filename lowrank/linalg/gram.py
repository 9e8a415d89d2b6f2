"""Second moments and the errors measured with them."""

from __future__ import annotations

import torch
from torch import Tensor


def gram_sum(rows: Tensor) -> Tensor:
    """Σ x xᵀ over rows (tokens, in), multiplied in fp32 (fp64 inputs: fp64), summed in float64.

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
    """Σ x yᵀ over the rows of two tensors (tokens, ·), in the precision of `gram_sum`."""
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
    """Cholesky factors of positive semi-definite (…, k, k), which may be singular or zero.

    Args:
        shift: added to each diagonal, on top of a ridge for rounding errors.
    """
    side = normal.diagonal(dim1=-2, dim2=-1)
    ridge = side.amax(-1, keepdim=True) * (8 * side.shape[-1] * torch.finfo(normal.dtype).eps)
    ridge = ridge.clamp(min=torch.finfo(normal.dtype).tiny ** 0.5) + shift
    root: Tensor = torch.linalg.cholesky(normal + torch.diag_embed(ridge.expand_as(side)))
    return root


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context that disables autocast on the device of `tensor`."""
    return torch.autocast(tensor.device.type, enabled=False)


DAMP = 0.1
FLOOR = 1e-11  # of the trace: above the rounding errors of a singular G
TINY = 1e-30  # for a zero G


def output_root(out_gram: Tensor, damp: float = DAMP) -> Tensor:
    """S (out, out) float64, upper triangular, with SᵀS = G + damp · mean(diag G) · I.

    The Cholesky factor, which is far cheaper than an eigendecomposition; S V has the singular
    values of G^½ V.

    Args:
        out_gram: G = E[g gᵀ] (out, out), symmetric positive semi-definite. If zero, or singular
            and undamped, it is floored: S is always invertible.
        damp: relative to the mean of the diagonal.
    """
    with full_precision(out_gram):
        exact = out_gram.double()
        size = float(exact.diagonal().mean())
        least = size * len(exact) * FLOOR or TINY
        eye = torch.eye(len(exact), dtype=exact.dtype, device=exact.device)
        root: Tensor = torch.linalg.cholesky(exact + max(damp * size, least) * eye)
        return root.T


def unrooted(root: Tensor, up: Tensor) -> Tensor:
    """S⁻¹ up (out, rank), by a triangular solve."""
    with full_precision(root):
        solved: Tensor = torch.linalg.solve_triangular(root.to(up), up, upper=True)
        return solved
