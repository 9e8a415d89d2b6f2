"""Refit of both factors at once, for inputs that are no longer those of the dense model.

A layer inside a compressed model reads x', where the dense model's layer reads x. Its target is
t = W((1 − λ)x' + λx), so that E[t x'ᵀ] = W K with K = (1 − λ)H' + λC, H' = E[x'x'ᵀ] and
C = E[x x'ᵀ]. The best product of rank r in ‖S(t − up·down x')‖ is the truncated SVD of
S W K H'^{-½}: its left vectors are the eigenvectors of T H' Tᵀ with T = S W K H'⁻¹. MPIFA (arXiv
2501.19090) reaches it by turns, one factor after the other; SAES-SVD and AA-SVD have special cases.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gram import full_precision, unrooted
from .svd import compute_dtype, factor

RIDGE = 1e-4  # of the mean diagonal of H'


def regressed(
    weight: Tensor, gram: Tensor, target: Tensor, *, ridge: float = RIDGE, least: float = 0.0
) -> Tensor:
    """W K H'⁻¹ (out, in) with one ridge on K and H', so that K = H' gives W.

    H' has no low-rank form, so that this is the one step on the side of the inputs however wide:
    a Cholesky decomposition, in³/3 multiplications, and two triangular solves for the rows of W
    alone; no eigenproblem. A gram that rounding has made indefinite gets a larger ridge until it
    is not; in the limit W stays as it is.

    Args:
        weight: W (out, in).
        gram: H' (in, in), symmetric positive semi-definite up to rounding; zero gives W.
        target: K (in, in).
        least: the ridge is no smaller, in the unit of H'; for one whose rounding errors are large
            beside itself.

    Returns:
        In the dtype of `gram`.
    """
    matrix = weight.detach().to(gram.dtype)
    size = float(gram.diagonal().mean())
    shift = max(ridge * size, least)
    if size <= 0 or shift <= 0:
        return matrix
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    with full_precision(gram):
        root, failed = torch.linalg.cholesky_ex(gram + shift * eye)
        while int(failed) and math.isfinite(shift):
            shift *= 10
            root, failed = torch.linalg.cholesky_ex(gram + shift * eye)
        rows = matrix @ (target + shift * eye)
        solved: Tensor = torch.cholesky_solve(rows.T, root).T
    return solved


def refit_factors(
    weight: Tensor,
    rank: int,
    gram: Tensor,
    target: Tensor,
    *,
    root: Tensor | None = None,
    ridge: float = RIDGE,
    least: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors for the stream that the layer really reads.

    Args:
        weight: W (out, in).
        gram: H' = E[x'x'ᵀ] (in, in).
        target: K = (1 − λ)H' + λE[x x'ᵀ] (in, in).
        root: S (out, out) as `output_root` gives it, upper triangular: SᵀS is the metric of the
            outputs; None stands for the identity.
        ridge, least: see `regressed`.

    Returns:
        up (out, rank) and down (rank, in), float64 up to the size that is decomposed in it.
    """
    dtype = compute_dtype(min(weight.shape))
    with full_precision(weight):
        moved = regressed(weight, gram, target, ridge=ridge, least=least).to(dtype)
        metric = gram.to(dtype)
        shift = max(ridge * float(metric.diagonal().mean()), least)
        metric = metric + shift * torch.eye(len(metric), dtype=dtype, device=metric.device)
        if root is None:
            return factor(moved, rank, metric, seed=seed)
        up, down = factor(root.to(dtype) @ moved, rank, metric, seed=seed)
        return unrooted(root, up), down
