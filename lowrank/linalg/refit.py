"""Joint refit of both factors, to the inputs of the layer in the compressed model.

A layer of the compressed model reads x', where the dense model's layer reads x. Its target is
t = (1 − λ)Wx' + λ(Wx + d), so that E[t x'ᵀ] = (1 − λ)W H' + λ(W C + D) with H' = E[x'x'ᵀ],
C = E[x x'ᵀ] and D = E[d x'ᵀ]. Here d is the error of a stream that the layer's output is added to,
dense less compressed; zero for other layers. The best product of rank r in ‖S(t − up·down x')‖ is
the truncated SVD of S T H'^½, T = E[t x'ᵀ] H'⁻¹: its left vectors are the eigenvectors of
S T H' Tᵀ Sᵀ. MPIFA (arXiv 2501.19090) alternates between the factors instead; SAES-SVD and AA-SVD
solve special cases. That the sum is the target, and not the layer's part of it alone, is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import full_precision, shifted_root, unrooted
from .svd import compute_dtype, factor

RIDGE = 1e-4  # of the mean diagonal of H'


def regressed(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    *,
    share: float = 1.0,
    extra: Tensor | None = None,
    ridge: float = RIDGE,
    least: float = 0.0,
) -> Tensor:
    """T (out, in), with the same ridge on C and H', so that C = H' gives W where D is zero.

    The one decomposition of size `in` even where out is smaller: Cholesky, in³/3 multiplications,
    and two triangular solves for the rows of W; no eigenproblem. It is the one matrix of size `in`
    that is held beside those given. If rounding has made H' indefinite, the ridge grows until it is
    not; in the limit the result is W.

    Args:
        weight: W (out, in).
        gram: H' (in, in), symmetric positive semi-definite up to rounding; zero gives W.
        cross: C (in, in).
        share: λ, in [0, 1].
        extra: D (out, in); None for zero.
        least: lower bound of the ridge, in the unit of H'; for an H' with large relative rounding
            errors.

    Returns:
        In the dtype of `gram`.
    """
    matrix = weight.detach().to(gram.dtype)
    size = float(gram.diagonal().mean())
    shift = max(ridge * size, least)
    if size <= 0 or shift <= 0:
        return matrix
    with full_precision(gram):
        root, grown = shifted_root(gram, gram.new_tensor([shift]))
        rows = (matrix @ cross).add_(grown * matrix)
        if extra is not None:
            rows += extra
        half = torch.linalg.solve_triangular(root.mT, rows, upper=True, left=False)
        solved = torch.linalg.solve_triangular(root, half, upper=False, left=False)
        return matrix.lerp(solved, share)


def refit_factors(
    weight: Tensor,
    rank: int,
    gram: Tensor,
    cross: Tensor,
    *,
    share: float = 1.0,
    extra: Tensor | None = None,
    root: Tensor | None = None,
    ridge: float = RIDGE,
    least: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors for the inputs in the compressed model.

    Args:
        weight: W (out, in).
        gram: H' = E[x'x'ᵀ] (in, in).
        cross: C = E[x x'ᵀ] (in, in).
        share: λ: the target's share of the dense stream, in [0, 1].
        extra: D = E[d x'ᵀ] (out, in), d the error of a stream that the output is added to; None for
            zero.
        root: S (out, out) from `output_root`, upper triangular: SᵀS is the metric of the outputs;
            None stands for the identity.
        ridge, least: see `regressed`.

    Returns:
        up (out, rank) and down (rank, in), in the compute dtype.
    """
    dtype = compute_dtype(min(weight.shape))
    with full_precision(weight):
        moved = regressed(
            weight, gram, cross, share=share, extra=extra, ridge=ridge, least=least
        ).to(dtype)
        metric = gram.to(dtype)
        shift = max(ridge * float(metric.diagonal().mean()), least)
        if root is None:
            return factor(moved, rank, metric, shift=shift, seed=seed)
        up, down = factor(root.to(dtype) @ moved, rank, metric, shift=shift, seed=seed)
        return unrooted(root, up), down
