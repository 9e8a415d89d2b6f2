"""Refit of both factors at once, for inputs that are no longer those of the dense model.

A layer inside a compressed model reads x', where the dense model's layer reads x. Its target is
t = W((1 − λ)x' + λx), so that E[t x'ᵀ] = W K with K = (1 − λ)H' + λC, H' = E[x'x'ᵀ] and
C = E[x x'ᵀ]. The best product of rank r in ‖S(t − up·down x')‖ is the truncated SVD of
S W K H'^{-½}: its left vectors are the eigenvectors of T H' Tᵀ with T = S W K H'⁻¹. MPIFA (arXiv
2501.19090) reaches it by turns, one factor after the other; SAES-SVD and AA-SVD have special cases.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import full_precision
from .svd import compute_dtype, factor
from .two_sided import unrooted

RIDGE = 1e-4  # of the mean diagonal of H'


def regressed(gram: Tensor, target: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """K H'⁻¹ (in, in) with a relative ridge on both, so that K = H' gives the identity.

    Args:
        gram: H' (in, in), symmetric positive semi-definite; the zero matrix gives the identity.
        target: K (in, in).
    """
    size = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if float(size) <= 0:
        return eye
    with full_precision(gram):
        shift = ridge * size * eye
        solved: Tensor = torch.linalg.solve(gram + shift, (target + shift).T).T
    return solved


def refit(
    weight: Tensor,
    rank: int,
    gram: Tensor,
    target: Tensor,
    *,
    root: Tensor | None = None,
    ridge: float = RIDGE,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors for the stream that the layer really reads.

    Args:
        weight: W (out, in).
        gram: H' = E[x'x'ᵀ] (in, in).
        target: K = (1 − λ)H' + λE[x x'ᵀ] (in, in).
        root: S (out, out) as `output_root` gives it, upper triangular: SᵀS is the metric of the
            outputs; None stands for the identity.

    Returns:
        up (out, rank) and down (rank, in), float64 up to the size that is decomposed in it.
    """
    dtype = compute_dtype(min(weight.shape))
    with full_precision(weight):
        moved = weight.detach().to(dtype) @ regressed(gram, target, ridge=ridge).to(dtype)
        metric = gram.to(dtype)
        shift = ridge * metric.diagonal().mean()
        metric = metric + shift * torch.eye(len(metric), dtype=dtype, device=metric.device)
        if root is None:
            return factor(moved, rank, metric, seed=seed)
        up, down = factor(root.to(dtype) @ moved, rank, metric, seed=seed)
        return unrooted(root, up), down
