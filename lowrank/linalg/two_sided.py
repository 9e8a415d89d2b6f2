"""Factors that weigh outputs as well as inputs: min ‖G^½ (W − Ŵ) H^½‖.

With an invertible root S of the damped G the optimum is Ŵ = S⁻¹ U_r U_rᵀ S W, where U_r are the
leading eigenvectors of (S W) H (S W)ᵀ: the one-sided problem of S W, turned back by a solve. G from
output gradients gives the second-order estimate of the loss (K-FAC; IO-SVD and OBD-LLM use it for
compression).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import full_precision

DAMP = 0.1
FLOOR = 1e-11  # of the trace: above what rounding does to a singular G
TINY = 1e-30  # of a G that is zero


def output_root(out_gram: Tensor, damp: float = DAMP) -> Tensor:
    """S (out, out) float64, upper triangular, with SᵀS = G + damp · mean(diag G) · I.

    Cholesky's factor, for outputs are many and an eigendecomposition costs far more products; S V
    has the singular values that G^½ V has.

    Args:
        out_gram: G = E[g gᵀ] (out, out), symmetric positive semi-definite. The zero matrix, and
            one that is undamped and singular, are floored: S is always invertible.
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
