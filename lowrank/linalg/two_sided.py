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


def output_root(out_gram: Tensor, damp: float = DAMP) -> Tensor:
    """Symmetric S (out, out), float64, with S² = G + damp · mean(diag G) · I, scaled to G's size.

    Args:
        out_gram: G = E[g gᵀ] (out, out), symmetric positive semi-definite. The zero matrix, and
            one that is undamped and singular, are floored: S is always invertible.
        damp: relative to the mean of the diagonal.
    """
    with full_precision(out_gram):
        values, vectors = torch.linalg.eigh(out_gram.double())
        values = values.clamp(min=0) + damp * float(out_gram.diagonal().double().mean())
        least = max(float(values.max()) * 1e-12, torch.finfo(torch.float64).tiny ** 0.5)
        root: Tensor = (vectors * values.clamp(min=least).sqrt()) @ vectors.T
        return root


def unrooted(root: Tensor, up: Tensor) -> Tensor:
    """S⁻¹ up (out, rank), by a solve."""
    with full_precision(root):
        solved: Tensor = torch.linalg.solve(root.to(up), up)
        return solved
