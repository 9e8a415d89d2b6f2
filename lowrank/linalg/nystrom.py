"""Generalized Nyström: W ≈ W X (Yᵀ W X)⁺ Yᵀ W with random X, Y (Nakatsukasa, arXiv 2009.11392).

W is read once, by the two sketches W X and Yᵀ W: it may be a stream or lie in pieces, and there
is no decomposition but the QR of their core. The pseudo-inverse is never formed: with
Yᵀ W X = Q T, W X is solved with T and Yᵀ W multiplied by Qᵀ. Y is wider than X, without which
the error is a ratio of Gaussians with a long tail. Both are Gaussian; in the norm ‖· H^½‖ the
columns of X are drawn with covariance H, as if they were inputs.

What the sketches give at one rank can be truncated to any smaller one (`ordered`). A flat spectrum
makes the oblique projection farther from W than zero is; so the components that remain are scaled
by their least-squares coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import full_precision, safe_root
from .svd import balance, compute_dtype


def generalized_nystrom(
    weight: Tensor,
    rank: int,
    gram: Tensor | None = None,
    *,
    oversample: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Generalized Nyström factors of W.

    Args:
        weight: W (out, in).
        rank: columns of X, in [1, min(out, in)].
        gram: H (in, in), or None for the identity.
        oversample: columns of Y above those of X, >= 0.
        seed: of X and Y, drawn on the CPU, so that every device draws the same numbers.

    Returns:
        up (out, rank) and down (rank, in) in the compute dtype. Beyond the rank of W a component
        is zero.
    """
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=matrix.dtype).to(matrix.device)

    (out_features, in_features), width = matrix.shape, rank + oversample
    with full_precision(matrix):
        right, left = drawn(in_features, rank), drawn(out_features, width)
        if gram is not None:
            right = safe_root(gram.to(matrix)) @ right
        sketch, rows = matrix @ right, left.T @ matrix  # (out, rank), (width, in)
        basis, triangle = torch.linalg.qr(left.T @ sketch)
        size = triangle.diagonal().abs()
        alive = size > width * torch.finfo(matrix.dtype).eps * size.max()
        count = int(alive.long().cumprod(0).sum())  # those that follow depend on these
        up = torch.eye(out_features, rank, dtype=matrix.dtype, device=matrix.device)
        down = matrix.new_zeros(rank, in_features)
        up[:, :count] = torch.linalg.solve_triangular(
            triangle[:count, :count], sketch[:, :count], upper=True, left=False
        )
        down[:count] = basis[:, :count].T @ rows
        return up, down


def ordered(
    weight: Tensor, up: Tensor, down: Tensor, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The singular components of up · down in the norm ‖· H^½‖, each as near to W as a scale can
    bring it, nearest first.

    They are orthogonal in that norm, so that each has its own best scale, and every further
    component lowers the error. It takes decompositions of the rank's size alone.

    Args:
        weight: W (out, in).
        up, down: (out, k), (k, in), in the compute dtype.
        gram: H (in, in), or None for the identity.

    Returns:
        up (out, k), down (k, in), balanced.
    """
    with full_precision(up):
        matrix, basis = weight.detach().to(up.dtype), torch.linalg.qr(up)
        rows = basis.R @ down
        problem = _times(rows, gram) @ rows.T
        turn = torch.linalg.eigh((problem + problem.T) / 2).eigenvectors
        left, right = basis.Q @ turn, turn.T @ rows
        weighed = _times(right, gram)
        energy = (weighed * right).sum(1)
        along = (left.T @ matrix * weighed).sum(1)  # u_jᵀ W H down_jᵀ
        alive = energy > len(energy) * torch.finfo(up.dtype).eps * energy.max()
        scale = torch.where(alive, along / energy.where(alive, 1), 0)
        gain = (scale * along).sort(descending=True, stable=True).indices
        return balance(left[:, gain], (scale[:, None] * right)[gain])


def leading_errors(weight: Tensor, up: Tensor, down: Tensor, gram: Tensor | None = None) -> Tensor:
    """‖(W − up[:, :r] down[:r]) H^½‖² at ranks 0…k, (k + 1,) float64, of any factors.

    Args:
        weight: W (out, in).
        up, down: (out, k), (k, in), in the compute dtype.
        gram: H (in, in), or None for the identity.
    """
    with full_precision(up):
        matrix = weight.detach().to(up.dtype)
        total = (_times(matrix, gram) * matrix).double().sum()
        weighed = _times(down, gram)
        along = (up.T @ matrix * weighed).double().sum(1).cumsum(0)
        products = (up.T @ up).double() * (weighed @ down.T).double()
        whole = products.cumsum(0).cumsum(1).diagonal()
        rest = torch.cat([total[None], total - 2 * along + whole])
    return torch.where(rest > len(rest) * torch.finfo(up.dtype).eps * total, rest, 0)


def _times(rows: Tensor, gram: Tensor | None) -> Tensor:
    """rows · H."""
    return rows if gram is None else rows @ gram.to(rows)
