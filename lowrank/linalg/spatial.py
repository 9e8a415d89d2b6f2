"""Separable kernels: W[o, i, a, b] ≈ Σ_r up[o, r, b] · down[r, i, a].

Rearranged to (O · kw, I · kh) that is a matrix of rank r, and its truncated SVD is optimal in
‖W − Ŵ‖ (Tai et al., arXiv 1511.06067). In the metric of the patches no closed form is known:
updates alternate between the sides, and the error never rises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import LowrankError
from .svd import balance, energies, factor
from .tucker import Parts, alternated, conditioned, first_of, nested_fits, outer


def spatial_matrix(weight: Tensor) -> Tensor:
    """A weight (O, I, kh, kw) as (O · kw, I · kh).

    Raises:
        LowrankError: it does not have two spatial dimensions.
    """
    if weight.ndim != 4:
        raise LowrankError(
            f"expected a weight (O, I, kh, kw), got a tensor of shape {tuple(weight.shape)}"
        )
    outputs, inputs, height, width = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(outputs * width, inputs * height)


def spatial_energies(weight: Tensor) -> Tensor:
    """Squared singular values of the rearranged weight, descending, float64; their `tails` are the
    errors of all ranks."""
    return energies(spatial_matrix(weight))


def spatial_bounds(weight: Tensor, gram: Tensor, ranks: Sequence[int]) -> list[tuple[int, float]]:
    """(rank, error): the squared error in the metric of the patches at the first start of
    `spatial_factors`, an upper bound for its result.

    Args:
        weight: (O, I, kh, kw).
        gram: H, as for `spatial_factors`.
        ranks: ascending, each at most min(O · kw, I · kh).
    """
    flat = weight.detach().double().flatten(1, 2)  # (O, I·kh, kw)
    basis = torch.linalg.qr(first_of(flat, gram).T).Q.T  # nested: that of a rank leads it
    fits = nested_fits(flat, basis, gram, ranks)
    return [(rank, lost) for rank, (_, lost) in zip(ranks, fits, strict=True)]


def spatial_factors(
    weight: Tensor, rank: int, gram: Tensor | None = None, *, sweeps: int = 10
) -> tuple[Tensor, Tensor]:
    """up (O, r, kw) and down (r, I, kh) of a weight (O, I, kh, kw), balanced.

    Args:
        weight: any floating dtype; computed in float64 where a metric is given.
        rank: r, at most min(O · kw, I · kh).
        gram: H (I·kh·kw, I·kh·kw), of patches in the weight's order, to minimise ‖(W − Ŵ)H^½‖.
            None stands for the identity, where the SVD is optimal.
        sweeps: maximum number of alternations, with a metric; 0 keeps the start.

    Raises:
        LowrankError: the weight does not have two spatial dimensions.
    """
    matrix = spatial_matrix(weight)
    outputs, inputs, height, width = weight.shape
    if gram is None:
        up, down = factor(matrix, rank)
    else:
        up, down = _by_outputs(weight, rank, gram, sweeps)
    return up.view(outputs, width, rank).transpose(1, 2), down.reshape(rank, inputs, height)


def _by_outputs(weight: Tensor, rank: int, gram: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Factors of (O · kw, I · kh), the better of two starts: channels chosen in the metric of the
    columns, and the SVD. Kernel columns take the place of the taps in a Tucker form."""
    rows = weight.detach().double().flatten(1, 2)  # (O, I·kh, kw)
    inner = min(rows.shape[0], rank * rows.shape[2])  # the outputs are not truncated
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
