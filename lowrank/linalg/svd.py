"""Truncated decompositions: W ≈ up · down, always computed on the smaller side of W.

The optimum for the norm ‖(W − Ŵ)H^½‖ (H = E[x xᵀ]; H = I is the plain SVD) is Ŵ = U_r U_rᵀ W,
where U_r are the leading eigenvectors of W H Wᵀ: nothing is inverted, whatever the rank of H.
This one form serves plain SVD, SVD-LLM (arXiv 2403.07378), its v2 (arXiv 2503.12340) and
Swift-SVD, which share this optimum. For out > in a thin QR, W = QR, moves the problem to the
smaller side: the eigenvectors of R H Rᵀ, multiplied by Q. With H = I, Wᵀ is factored instead. A
diagonal H may be given as the vector (in,) of its diagonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import full_precision

FP64_UP_TO = 4096  # smaller side of W; above it fp32, with error sums in fp64
RANDOMISED_FROM = 4096  # smaller side above which ranks up to an eighth of it are randomised


def compute_dtype(side: int) -> torch.dtype:
    return torch.float64 if side <= FP64_UP_TO else torch.float32


def energies(weight: Tensor, gram: Tensor | None = None) -> Tensor:
    """Squared singular values of W H^½, descending, (min(out, in),) float64.

    Args:
        weight: W (out, in), any floating dtype.
        gram: H (in, in), symmetric positive semi-definite, or its diagonal (in,); None stands for
            the identity.
    """
    if gram is None and weight.shape[0] > weight.shape[1]:
        weight = weight.T
    with full_precision(weight):
        problem, _ = _reduced(weight, gram)
        values: Tensor = torch.linalg.eigvalsh(problem)
    return values.double().clamp(min=0).flip(0)


def tails(energy: Tensor) -> Tensor:
    """Error at every rank 0…k: the energy beyond it, (k + 1,) float64.

    Summed from the small end, so that small tails keep their precision.
    """
    rest = energy.double().flip(0).cumsum(0).flip(0)
    return torch.cat([rest, rest.new_zeros(1)])


def factor(
    weight: Tensor,
    rank: int,
    gram: Tensor | None = None,
    *,
    shift: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors of W in the norm ‖· H^½‖.

    Args:
        weight: W (out, in).
        rank: in [1, min(out, in)].
        gram: H (in, in), its diagonal (in,), or None for the identity.
        shift: added to the diagonal of H, which is not copied for it.
        seed: of the randomised SVD, used only above `RANDOMISED_FROM`.

    Returns:
        up (out, rank) and down (rank, in) in the compute dtype, balanced, with fixed signs, so
        that runs agree.
    """
    if gram is None and weight.shape[0] > weight.shape[1]:
        down, up = factor(weight.T, rank, seed=seed)
        return up.T, down.T
    basis = output_basis(weight, rank, gram, shift=shift, seed=seed)
    with full_precision(weight):
        return balance(basis, basis.T @ weight.detach().to(basis.dtype))


def output_basis(
    weight: Tensor,
    rank: int,
    gram: Tensor | None = None,
    *,
    shift: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Orthonormal (out, rank): the leading left singular vectors of W H^½, signs fixed.

    At rank min(out, in) it spans all outputs of W, whatever the rank of H. Arguments as for
    `factor`.
    """
    side = min(weight.shape)
    if side > RANDOMISED_FROM and rank <= side // 8:
        return randomised_basis(weight, rank, gram, shift=shift, seed=seed)
    with full_precision(weight):
        problem, turn = _reduced(weight, gram, shift)
        vectors = torch.linalg.eigh(problem).eigenvectors[:, -rank:].flip(1)
        return _fix_signs(vectors if turn is None else turn @ vectors)


def carried(weight: Tensor, basis: Tensor, gram: Tensor) -> Tensor:
    """Energy of each output direction, u_jᵀ W H Wᵀ u_j, (rank,) float64.

    The error of U_r U_rᵀ W is the sum over the discarded directions, for any orthonormal basis
    (out, rank) that spans the outputs of W.
    """
    with full_precision(weight):
        rows = basis.T @ weight.detach().to(basis.dtype)  # (rank, in)
        return (_times(rows, gram) * rows).double().sum(1).clamp(min=0)


def randomised_basis(
    weight: Tensor,
    rank: int,
    gram: Tensor | None = None,
    *,
    oversample: int = 10,
    power: int = 2,
    shift: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Orthonormal (out, rank): approximate leading left singular vectors of W H^½.

    Halko, Martinsson and Tropp (arXiv 0909.4061), algorithm 4.4 with a QR after every product,
    followed by a Rayleigh–Ritz step that drops the oversampling. The generator is seeded on the
    CPU, so that every device draws the same numbers.
    """
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    metric = None if gram is None else gram.to(matrix)
    width = min(rank + oversample, *weight.shape)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(weight.shape[0], width, generator=generator, dtype=matrix.dtype)
    basis = probe.to(matrix.device)
    with full_precision(matrix):
        for _ in range(power + 1):
            basis = torch.linalg.qr(_apply(matrix, metric, basis, shift)).Q
        ritz = torch.linalg.eigh(basis.T @ _apply(matrix, metric, basis, shift)).eigenvectors
        return _fix_signs(basis @ ritz[:, -rank:].flip(1))


def balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each component so that its column of `up` and row of `down` have equal norms.

    Training then sees factors of one scale, and rounding to 16 bits affects both alike. A component
    of zero energy keeps its unit side: with both sides zero, no gradient could reach it. Zero means
    below √ε of the largest, the resolution of the eigenproblem of W H Wᵀ.
    """
    long_up, long_down = up.norm(dim=0), down.norm(dim=1)
    product = long_up * long_down
    alive = product > product.max() * torch.finfo(up.dtype).eps ** 0.5
    scale = torch.where(alive, (long_down / long_up.where(alive, 1)).sqrt(), 1)
    return up * scale, down / scale.where(alive, 1)[:, None]


def _reduced(
    weight: Tensor, gram: Tensor | None, shift: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The eigenproblem on the smaller side, and the Q that maps its vectors back, if any."""
    core, turn = weight.detach().to(compute_dtype(min(weight.shape))), None
    if core.shape[0] > core.shape[1]:
        turn, core = torch.linalg.qr(core)
    if gram is None:
        return core @ core.T, turn
    return _symmetric(_times(core, gram, shift) @ core.T), turn


def _apply(matrix: Tensor, metric: Tensor | None, basis: Tensor, shift: float) -> Tensor:
    """W H Wᵀ · basis."""
    inner = matrix.T @ basis
    return matrix @ (inner if metric is None else _times(inner.T, metric, shift).T)


def _times(rows: Tensor, gram: Tensor, shift: float = 0.0) -> Tensor:
    """rows · (H + shift · I), of H or its diagonal."""
    product = rows * gram.to(rows) if gram.ndim == 1 else rows @ gram.to(rows)
    return product.add_(rows, alpha=shift) if shift else product


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _fix_signs(vectors: Tensor) -> Tensor:
    """Make each column's entry of largest magnitude positive."""
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    signs = vectors.gather(0, largest).sign()
    return vectors * torch.where(signs == 0, 1, signs)
