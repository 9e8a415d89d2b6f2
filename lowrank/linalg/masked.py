"""Low rank plus sparse: W ≈ L + S, with S zero off a mask, min ‖(W − L − S) H^½‖.

OATS (arXiv 2409.13652) alternates a truncated SVD with thresholding, both scaled by the inputs'
sizes alone; 3BASiL (arXiv 2603.01376) is a three-block ADMM in the full metric. So is this, with
our own numerics (admm.py): inputs are scaled to unit size, S is split into a part that minimises
the loss and one that has the mask, and each iteration updates the basis of L by one step of
subspace iteration. That selects the mask; the values on it are fitted by least squares, all rows at
once, alternating with the best L.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .admm import STEPS, alternate, on_support
from .gram import bounded_fit, full_precision, unit_of
from .svd import balance, compute_dtype, output_basis

ITERATIONS = 80
WEAK, STRONG = 0.01, 1.0  # penalty that couples the two parts of S, at first and at last
APART = 0x9E3779B9  # from seeds that weights were drawn by, which would draw their own entries
LEAST = 1e-12  # floor of the diagonal of H, relative to its largest entry

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
    """Low-rank and sparse parts that approximately minimise ‖(W − L − S) H^½‖.

    Args:
        weight: W (out, in).
        rank: r in [1, min(out, in)].
        keep: maps magnitudes (out, in) to the mask of entries to keep: `largest`, or N:M.
        gram: H (in, in), or None for the identity.
        iterations: of ADMM; 0: the mask of the residual of the best rank r.
        seed: as for `factor`.
    """
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    matrix = matrix / (unit := unit_of(matrix))
    metric = torch.eye(matrix.shape[1], dtype=torch.float64) if gram is None else gram

    def fit(metric: Tensor | None) -> MaskedParts:
        assert metric is not None
        return _fitted(matrix, rank, keep, metric, iterations, seed)

    with full_precision(matrix):
        parts = bounded_fit(matrix, metric.to(matrix), fit, _whole)
        up, down = balance(parts.up, parts.down * unit)
        return MaskedParts(up, down, parts.sparse * unit, parts.mask)


def _whole(parts: MaskedParts) -> list[Tensor]:
    """Both parts and their sum."""
    low = parts.up @ parts.down
    return [low, parts.sparse, low + parts.sparse]


def _fitted(
    matrix: Tensor, rank: int, keep: Keep, metric: Tensor, iterations: int, seed: int
) -> MaskedParts:
    """The parts in a metric (in, in), `up` orthonormal."""
    own = metric.diagonal()
    scale = own.clamp(min=LEAST * float(own.max())).sqrt()
    target, metric = matrix * scale, metric / scale / scale[:, None]
    basis = output_basis(target, rank, metric, seed=seed)
    basis, sparse, mask = _chosen(target, basis, metric, keep, iterations)
    sparse = on_mask(target - _low(target - sparse, basis), metric, mask, sparse)
    basis = output_basis(target - sparse, rank, metric, seed=seed)
    low = _low(target - sparse, basis)
    sparse = on_mask(target - low, metric, mask, sparse)
    return MaskedParts(basis, basis.T @ low / scale, sparse / scale, mask)


def largest(count: int) -> Keep:
    """A `Keep` of the `count` largest entries of the matrix."""

    def keep(size: Tensor) -> Tensor:
        mask = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
        mask[size.flatten().topk(count).indices] = True
        return mask.view_as(size)

    return keep


def drawn(count: int, share: float, seed: int) -> Keep:
    """A `Keep` of `count` entries: `share` of them the largest, the rest drawn from the others with
    probability ∝ w², as in the sparsification of matrices (arXiv 1005.4732).

    Each entry has one exponential draw e, the same on every device and in every call with this
    seed, and those of least e / w² are kept; zeros come last.
    """
    sure = round(share * count)

    def keep(size: Tensor) -> Tensor:
        mask = largest(sure)(size)
        rng = torch.Generator().manual_seed((seed + APART) % 2**63)
        draws = torch.empty(size.shape, dtype=torch.float64).exponential_(generator=rng)
        place = size.double().clamp(min=torch.finfo(torch.float64).tiny).log()
        place = (2 * place - draws.to(place.device).log()).masked_fill(mask, -math.inf)
        mask.view(-1)[place.flatten().topk(count - sure).indices] = True
        return mask

    return keep


def on_mask(
    target: Tensor, metric: Tensor, mask: Tensor, start: Tensor, *, steps: int = STEPS
) -> Tensor:
    """The S (out, in) on the mask of least ‖(target − S) H^½‖, by conjugate gradients from `start`.

    Rows are independent, and no row's error rises. In the null space of H, S keeps its start.
    """
    sparse = start * mask
    slope = (target - sparse) @ metric
    return on_support(
        sparse, slope, lambda s: s @ metric, mask, metric.diagonal(), apart=True, steps=steps
    )


def _chosen(
    target: Tensor, basis: Tensor, metric: Tensor, keep: Keep, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The basis of L, S and its mask, by ADMM from the residual of the given basis."""
    residual = target - _low(target, basis)
    mask = keep(residual.abs())
    sparse = residual * mask
    if not iterations:
        return basis, sparse, mask
    blocks = _Blocks(target, basis, metric, keep)
    sparse, mask = alternate(blocks, sparse, mask, iterations=iterations, weak=WEAK, strong=STRONG)
    return blocks.basis, sparse, mask


class _Blocks:
    """ADMM blocks: S, free and masked, and the basis U (out, r) of L."""

    def __init__(self, target: Tensor, basis: Tensor, metric: Tensor, keep: Keep) -> None:
        self.target, self.basis, self.metric, self.keep = target, basis, metric, keep
        self.low, self.whole = _low(target, basis), target @ metric
        power, turn = torch.linalg.eigh(metric)
        self.power, self.turn = power.clamp(min=0), turn

    def free(self, sparse: Tensor, dual: Tensor, rho: float) -> Tensor:
        """(R H − Y + ρ S) (H + ρ I)⁻¹ with R = T − L."""
        low = self.basis @ ((self.basis.T @ self.low) @ self.metric)
        pull = self.whole - low - dual + rho * sparse
        free: Tensor = ((pull @ self.turn) / (self.power + rho)) @ self.turn.T
        return free

    def project(self, wish: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.keep(wish.abs())
        return wish * mask, mask

    def follow(self, sparse: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        """One step of subspace iteration on R H Rᵀ with R = T − S."""
        residual = self.target - sparse
        self.basis = torch.linalg.qr(residual @ (self.metric @ (residual.T @ self.basis))).Q
        self.low = _low(residual, self.basis)
        return sparse, dual


def _low(rest: Tensor, basis: Tensor) -> Tensor:
    """U Uᵀ R: the best L with columns in the span of U."""
    return basis @ (basis.T @ rest)
