"""How far an approximation is from a weight in its largest direction, and its leading subspace."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .svd import compute_dtype, energies, output_basis


def spectral_error(weight: Tensor, approximation: Tensor) -> float:
    """‖W − Ŵ‖₂ / ‖W‖₂: the worst direction, beside which the Frobenius norm is an average.

    Args:
        weight, approximation: (out, in), floating.

    Returns:
        0 for equal ones; inf for a zero W and another Ŵ.
    """
    w = weight.detach().to(compute_dtype(min(weight.shape)))
    apart = float(energies(w - approximation.detach().to(w))[0])
    whole = float(energies(w)[0])
    if whole == 0:
        return math.inf if apart > 0 else 0.0
    return math.sqrt(apart / whole)


def spectrum_error(weight: Tensor, approximation: Tensor) -> float:
    """‖σ(W) − σ(Ŵ)‖ / ‖σ(W)‖, of the singular values in order: at most the Frobenius error
    (Mirsky 1960), and 0 whatever the directions if all values are kept.

    Args:
        weight, approximation: (out, in), floating.

    Returns:
        0 for equal ones; inf for a zero W and another Ŵ.
    """
    w = weight.detach().to(compute_dtype(min(weight.shape)))
    ours, theirs = (energies(t).clamp(min=0).sqrt() for t in (w, approximation.detach().to(w)))
    apart, whole = float((ours - theirs).norm()), float(ours.norm())
    if whole == 0:
        return math.inf if apart > 0 else 0.0
    return apart / whole


def subspace_angle(weight: Tensor, approximation: Tensor, count: int) -> float:
    """The largest principal angle, in degrees, between the leading `count` output directions.

    0: the approximation keeps the span of the leading left singular vectors; 90: it lost one.

    Args:
        weight, approximation: (out, in), floating.
        count: in [1, min(out, in)], at most the rank of the approximation: directions of singular
            value zero are arbitrary.
    """
    w = weight.detach().to(compute_dtype(min(weight.shape)))
    ours, theirs = (output_basis(t, count) for t in (w, approximation.detach().to(w)))
    inner = ours.T @ theirs
    # A cosine near 1 hides the angle: the sine, of what lies outside of the span, shows it.
    cosine = float(torch.linalg.svdvals(inner)[-1])
    sine = float(torch.linalg.matrix_norm(theirs - ours @ inner, 2))
    return math.degrees(math.atan2(sine, cosine))
