"""Tucker factors in training: C = S ×₀ U₀ ×₁ U₁, with orthonormal U₀ (out, a) and U₁ (in, b).

The core S is (a, b, k, …); spatial modes are not factored. Truncating each mode by its own singular
values is the truncated HOSVD of the core: the squared error is at most the sum of the squared
tails, so a total tolerance θ allows θ/√2 in each of two modes (arXiv 2305.19059, in the
single-gradient form of arXiv 2505.08022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .gram import full_precision
from .retract import core_svd, orthonormal
from .svd import compute_dtype


def unfolded(tensor: Tensor, mode: int) -> Tensor:
    """The unfolding along a mode, (size of the mode, product of all other sizes)."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def times(tensor: Tensor, matrices: Mapping[int, Tensor]) -> Tensor:
    """The tensor multiplied along each given mode by a matrix (new, old)."""
    for mode, matrix in matrices.items():
        tensor = torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)
    return tensor


def mode_svd(core: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors (n, k), signs fixed, and values (k,) of an unfolding, k ≤ n."""
    p, values, _ = core_svd(unfolded(core, mode))
    return p, values


def hosvd(tensor: Tensor, ranks: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """The truncated HOSVD: bases U_i (n_i, r_i) of the first modes, and the core."""
    with full_precision(tensor):
        wide = tensor.detach().to(compute_dtype(min(tensor.shape[:2])))
        bases = [mode_svd(wide, mode)[0][:, :rank] for mode, rank in enumerate(ranks)]
        return bases, times(wide, {mode: u.T for mode, u in enumerate(bases)})


def truncated_modes(
    bases: Sequence[Tensor], core: Tensor, vectors: Sequence[Tensor], ranks: Sequence[int]
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Truncate each mode to its leading `ranks` vectors, with re-orthonormalised bases.

    Args:
        bases: U_i (n_i, a_i); vectors: P_i (a_i, ·) of the core's unfoldings.

    Returns:
        New bases (n_i, r_i), the core, and the maps (r_i, a_i) that carry over moments.
    """
    with full_precision(core):
        turns = [p[:, :rank] for p, rank in zip(vectors, ranks, strict=True)]
        moved = [u.to(t) @ t for u, t in zip(bases, turns, strict=True)]
        fresh = [orthonormal(u) for u in moved]
        cut = times(core.to(turns[0]), {mode: t.T for mode, t in enumerate(turns)})
        fixes = {mode: q.T @ u for mode, (q, u) in enumerate(zip(fresh, moved, strict=True))}
        return fresh, times(cut, fixes), [t.T for t in turns]
