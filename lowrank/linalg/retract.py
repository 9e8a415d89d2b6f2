"""Augmentation, truncation and retraction of orthonormal bases, for training W = U S Vᵀ.

The first two are those of dynamical low-rank training (arXiv 2205.13571) in its single-gradient
form (arXiv 2505.08022). Two differences: a basis is augmented only by directions above rounding,
with U itself in its first columns, so that S is zero-padded and nothing is lost or mixed; and the
right singular vectors are used as V, where the authors' code takes Vᵀ for V. Everything is computed
in fp64 (fp32 above a side of 4096) with autocast off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import full_precision
from .svd import compute_dtype


def orthonormal(matrix: Tensor) -> Tensor:
    """Q of the thin QR of (n, r) with diag(R) > 0, which makes it unique: the retraction."""
    with full_precision(matrix):
        q, r = torch.linalg.qr(_wide(matrix))
        fixed: Tensor = q * _signs(r.diagonal())
        return fixed


def tangent(basis: Tensor, gradient: Tensor) -> Tensor:
    """(I − UUᵀ) G, (n, r), without forming the (n, n) matrix."""
    with full_precision(basis):
        u, g = _wide(basis), _wide(gradient)
        return g - u @ (u.T @ g)


def new_directions(basis: Tensor, gradient: Tensor, most: int | None = None) -> Tensor:
    """Orthonormal (n, k): directions of the gradient outside the basis, the strongest first.

    Args:
        basis: U (n, r), orthonormal columns.
        gradient: dL/dU (n, r), finite.
        most: upper bound of k, beside min(r, n − r). Directions below rounding are left out: a QR
            of [U | G] would fill them with noise.
    """
    with full_precision(basis):
        u, g = _wide(basis), _wide(gradient)
        count = min(*g.shape, u.shape[0] - u.shape[1])
        count = count if most is None else min(count, max(most, 0))
        size = float(g.norm())
        if size == 0 or count == 0:
            return u[:, :0]
        residual = g / size
        for _ in range(2):  # twice is enough
            residual = residual - u @ (u.T @ residual)
        left, values, _ = torch.linalg.svd(residual, full_matrices=False)
        floor = max(g.shape) * torch.finfo(basis.dtype).eps
        directions = left[:, : min(int((values > floor).sum()), count)]
        directions = directions - u @ (u.T @ directions)
        return orthonormal(directions) if directions.shape[1] else directions


def tail_rank(values: Tensor, tolerance: float) -> int:
    """The least j ≥ 0 with ‖σ[j:]‖ ≤ tolerance · ‖σ‖, over the whole tail.

    Args:
        values: σ (k,), descending.
        tolerance: relative, in [0, 1].
    """
    squares = values.double().square()
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return int(torch.nonzero(tails <= tolerance**2 * tails[0])[0])


def core_svd(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S = P diag(σ) Qᵀ: P (a, k), σ (k,) descending, Q (b, k), signs fixed.

    Note that Q is returned, not Qᵀ: its columns are the right singular vectors.
    """
    with full_precision(core):
        p, values, q_h = torch.linalg.svd(_wide(core), full_matrices=False)
        largest = p.abs().argmax(0, keepdim=True)
        signs = _signs(p.gather(0, largest)[0])
        return p * signs, values, q_h.mH * signs


def truncated_usv(
    u: Tensor, v: Tensor, p: Tensor, values: Tensor, q: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """U S Vᵀ truncated to the leading `rank` directions of S = P diag(σ) Qᵀ.

    Bases are re-orthonormalised, and the change goes into the core: rounding does not accumulate
    over thousands of truncations.

    Returns:
        U (out, r), S (r, r), V (in, r), and the maps for tensors of the core's shape:
        x → left x right, left (r, a), right (b, r).
    """
    with full_precision(u):
        p_r, q_r = p[:, :rank], q[:, :rank]
        wide_u, wide_v = _wide(u) @ p_r.to(_wide(u)), _wide(v) @ q_r.to(_wide(v))
        new_u, new_v = orthonormal(wide_u), orthonormal(wide_v)
        core = (new_u.T @ wide_u) @ torch.diag(values[:rank]).to(new_u) @ (wide_v.T @ new_v)
        return new_u, core, new_v, p_r.T, q_r


def clamped(values: Tensor, tau: float) -> Tensor:
    """σ clamped to [μ − e, μ + e], μ their mean and e = μ (τ − 1)/(τ + 1): condition ≤ τ.

    The clamp of CondLR (arXiv 2306.01485); τ ≥ 1, and at τ = 1 all become equal.
    """
    mean = float(values.double().mean()) if len(values) else 0.0
    reach = mean * (tau - 1) / (tau + 1)
    return values.clamp(mean - reach, mean + reach)


def loss_of_orthonormality(basis: Tensor) -> float:
    """max |UᵀU − I|."""
    with full_precision(basis):
        u = basis.detach().double()
        gram = u.T @ u
        return float((gram - torch.eye(gram.shape[0]).to(gram)).abs().max()) if len(gram) else 0.0


def _wide(matrix: Tensor) -> Tensor:
    return matrix.detach().to(compute_dtype(min(matrix.shape)))


def _signs(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values)
