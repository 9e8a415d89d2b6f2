"""Low rank plus single entries: W ≈ L + S, S zero but for a mask, min ‖(W − L − S) H^½‖.

OATS (arXiv 2409.13652) alternates a truncated SVD with thresholding, both scaled by the inputs'
sizes alone; 3BASiL (arXiv 2603.01376) is an ADMM of three blocks in the whole metric. So is this,
by our own numerics: inputs are scaled to unit size, S is split into a part that obeys the metric
and one that obeys the mask, and in every iteration one step of subspace iteration turns the basis
of L. That decides which entries stay; their values are least squares on the mask (conjugate
gradients, all rows at once), in turn with the best L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import full_precision
from .svd import balance, compute_dtype, output_basis

ITERATIONS = 80
WEAK, STRONG = 0.01, 1.0  # how much the two parts of S are held together, at first and at last
STEPS = 20  # of conjugate gradients
LEAST = 1e-12  # of the largest diagonal entry of H: inputs below count as that large

Keep = Callable[[Tensor], Tensor]


class MaskedParts(NamedTuple):
    """W (out, in) ≈ up · down + sparse.

    Attributes:
        up, down: (out, r), (r, in), in the compute dtype.
        sparse: (out, in), zero where `mask` is False.
        mask: (out, in), bool.
    """

    up: Tensor
    down: Tensor
    sparse: Tensor
    mask: Tensor


def low_rank_masked(
    weight: Tensor,
    rank: int,
    keep: Keep,
    gram: Tensor | None = None,
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> MaskedParts:
    """Low rank and entries of little error ‖(W − L − S) H^½‖.

    Args:
        weight: W (out, in).
        rank: r in [1, min(out, in)].
        keep: from sizes (out, in) ≥ 0 to the mask of those that stay: `largest`, or N of each M.
        gram: H (in, in), or None for the identity.
        iterations: of ADMM; 0: the mask of what the best rank r leaves.
        seed: as for `factor`.
    """
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    metric = torch.eye(matrix.shape[1], dtype=torch.float64) if gram is None else gram
    metric = metric.to(matrix)
    with full_precision(matrix):
        own = metric.diagonal()
        scale = own.clamp(min=LEAST * float(own.max())).sqrt()
        scale = scale.where(scale > 0, 1)
        target, metric = matrix * scale, metric / scale / scale[:, None]
        basis = output_basis(target, rank, metric, seed=seed)
        basis, sparse, mask = _chosen(target, basis, metric, keep, iterations)
        sparse = on_mask(target - _low(target - sparse, basis), metric, mask, sparse)
        basis = output_basis(target - sparse, rank, metric, seed=seed)
        low = _low(target - sparse, basis)
        sparse = on_mask(target - low, metric, mask, sparse)
        up, down = balance(basis, basis.T @ low / scale)
        return MaskedParts(up, down, sparse / scale, mask)


def largest(count: int) -> Keep:
    """Keeps so many entries of the matrix, wherever they are."""

    def keep(size: Tensor) -> Tensor:
        mask = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
        mask[size.flatten().topk(count).indices] = True
        return mask.view_as(size)

    return keep


def on_mask(
    target: Tensor, metric: Tensor, mask: Tensor, start: Tensor, *, steps: int = STEPS
) -> Tensor:
    """The S (out, in) on the mask of least ‖(R − S) H^½‖, by conjugate gradients from `start`.

    Every row is a problem of its own; the error of none rises. What a row shares with no input that
    varies stays as it is.
    """
    eps, tiny = torch.finfo(metric.dtype).eps, torch.finfo(metric.dtype).tiny
    scale = metric.diagonal().clamp(min=eps * float(metric.diagonal().max()) or 1.0)
    sparse = start * mask
    left = ((target - sparse) @ metric) * mask
    way = left / scale
    size = (left * way).sum(1, keepdim=True)
    done = eps * size  # below it only rounding errors are left, and where nothing bends
    for _ in range(steps):
        along = (way @ metric) * mask
        bent = (way * along).sum(1, keepdim=True)
        flat = (size <= done) | (bent <= eps * (scale * way * way).sum(1, keepdim=True))
        stride = (size / bent.clamp(min=tiny)).where(~flat, 0)
        sparse, left = sparse + stride * way, left - stride * along
        again = (left * left / scale).sum(1, keepdim=True)
        way = left / scale + (again / size.clamp(min=tiny)).where(~flat, 0) * way
        size = again
    return sparse


def _chosen(
    target: Tensor, basis: Tensor, metric: Tensor, keep: Keep, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The basis of L, S and its mask, by ADMM.

    `free` obeys the metric and `sparse` the mask; ρ rises, so that they agree in the end.
    """
    low = _low(target, basis)
    mask = keep((target - low).abs())
    sparse, dual = (target - low) * mask, torch.zeros_like(target)
    if not iterations:
        return basis, sparse, mask
    power, turn = torch.linalg.eigh(metric)
    power, whole = power.clamp(min=0), target @ metric
    for rho in torch.linspace(0, 1, iterations).tolist():
        rho = WEAK * (STRONG / WEAK) ** rho
        pull = whole - basis @ ((basis.T @ low) @ metric) - dual + rho * sparse
        free = ((pull @ turn) / (power + rho)) @ turn.T
        wish = free + dual / rho
        mask = keep(wish.abs())
        sparse = wish * mask
        dual = dual + rho * (free - sparse)
        rest = target - sparse
        basis = torch.linalg.qr(rest @ (metric @ (rest.T @ basis))).Q
        low = _low(rest, basis)
    return basis, sparse, mask


def _low(rest: Tensor, basis: Tensor) -> Tensor:
    """U Uᵀ R: the best L whose columns U spans."""
    return basis @ (basis.T @ rest)
