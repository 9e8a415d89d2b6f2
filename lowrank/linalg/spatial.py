"""Rows and columns of a kernel apart: W[o, i, a, b] ≈ Σ_r up[o, r, b] · down[r, i, a].

That is a matrix of rank r: the truncated SVD of the weight rearranged to (O · kw, I · kh) is the
best in ‖W − Ŵ‖ (Tai et al., arXiv 1511.06067). In the metric of the patches no closed form is
known: both sides are improved by turns, and the error never rises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LowrankError
from .svd import balance, energies, factor
from .tucker import Parts, alternated, conditioned, first_of, outer


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


def spatial_bounds(weight: Tensor, gram: Tensor, ranks: Sequence[int]) -> list[tuple[int, float]]:
    """Of every rank, the squared error in the metric of the patches at the first start of
    `spatial_factors`, which gives no worse.

    Args:
        weight: (O, I, kh, kw).
        gram: H, as for `spatial_factors`.
        ranks: each at most min(O · kw, I · kh).
    """
    flat = weight.detach().double().flatten(1, 2)  # (O, I·kh, kw)
    first, errors = first_of(flat, gram), []
    for rank in ranks:
        basis = torch.linalg.qr(first[:rank].T).Q.T
        errors.append((rank, float(conditioned(flat, basis, gram)[2])))
    return errors


def spatial_factors(
    weight: Tensor, rank: int, gram: Tensor | None = None, *, sweeps: int = 10
) -> tuple[Tensor, Tensor]:
    """up (O, r, kw) and down (r, I, kh) of a weight (O, I, kh, kw), balanced.

    Args:
        weight: any floating dtype; computed in float64 where a metric is given.
        rank: r, at most min(O · kw, I · kh).
        gram: H (I·kh·kw, I·kh·kw), of patches in the order of the weight's: the outputs are to be
            near, ‖(W − Ŵ)H^½‖. None stands for the identity, where the SVD is the optimum.
        sweeps: at most so many alternations, with a metric; 0 keeps the start.

    Raises:
        LowrankError: the weight has not two spatial dimensions.
    """
    matrix = spatial_matrix(weight)
    outputs, inputs, height, width = weight.shape
    if gram is None:
        up, down = factor(matrix, rank)
    else:
        up, down = _by_outputs(weight, rank, gram, sweeps)
    return up.view(outputs, width, rank).transpose(1, 2), down.reshape(rank, inputs, height)


def _by_outputs(weight: Tensor, rank: int, gram: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Factors of (O · kw, I · kh), from two starts: the channels that the metric of the columns
    chooses, and the SVD. To `down`, columns of the kernel are what taps are to a Tucker form."""
    rows = weight.detach().double().flatten(1, 2)  # (O, I·kh, kw)
    inner = min(rows.shape[0], rank * rows.shape[2])  # nothing is lost among the outputs
    best: tuple[float, Parts] | None = None
    for first in (first_of(rows, gram), factor(spatial_matrix(weight.double()), rank)[1]):
        basis = torch.linalg.qr(first[:rank].T).Q.T
        kernel, metric, _ = conditioned(rows, basis, gram)
        start = (*outer(kernel, metric, inner, rank), basis)
        parts, errors = alternated(rows, start, gram, sweeps=sweeps)
        if best is None or errors[-1] < best[0]:
            best = errors[-1], parts
    assert best is not None
    last, core, basis = best[1]
    up = torch.einsum("op,prb->obr", last, core).flatten(0, 1)  # (O·kw, r)
    return balance(up, basis)
