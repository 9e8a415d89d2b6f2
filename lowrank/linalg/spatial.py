"""Rows and columns of a kernel apart: W[o, i, a, b] ≈ Σ_r up[o, r, b] · down[r, i, a].

That is a matrix of rank r: the truncated SVD of the weight rearranged to (O · kw, I · kh) is the
best in ‖W − Ŵ‖ (Tai et al., arXiv 1511.06067).
"""

from __future__ import annotations

from torch import Tensor

from ..errors import LowrankError
from .svd import energies, factor


def spatial_matrix(weight: Tensor) -> Tensor:
    """A weight (O, I, kh, kw) as (O · kw, I · kh).

    Raises:
        LowrankError: it has not two spatial dimensions.
    """
    if weight.ndim != 4:
        raise LowrankError(
            f"expected a weight (O, I, kh, kw), got a tensor of shape {tuple(weight.shape)}"
        )
    outputs, inputs, height, width = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(outputs * width, inputs * height)


def spatial_energies(weight: Tensor) -> Tensor:
    """Squared singular values of the rearranged weight, descending, float64: `tails` of these are
    the errors of every rank."""
    return energies(spatial_matrix(weight))


def spatial_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up (O, r, kw) and down (r, I, kh) of a weight (O, I, kh, kw), balanced and sign-fixed."""
    up, down = factor(spatial_matrix(weight), rank)
    outputs, inputs, height, width = weight.shape
    return up.view(outputs, width, rank).transpose(1, 2), down.reshape(rank, inputs, height)
