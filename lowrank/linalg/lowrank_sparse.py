"""Low rank plus a few input channels: W ≈ U Uᵀ W + S, where S has columns at chosen inputs J only.

LOST (arXiv 2508.02668) splits a weight so to train from scratch: the leading singular values make
the low-rank part, and the channels on which the others are largest are kept as columns. Its body
was not at hand; its authors' related code chooses by a part of the tail and copies columns of W.
Here channels are chosen by the whole tail R = W − U UᵀW, and hold what is missing there: without
data that is R[:, J], and ‖W − L − S‖² = ‖R‖² − ‖R[:, J]‖², the best that any c columns can do.

In the norm of the outputs a channel also answers for what other inputs share with it: the best S is
the regression of R x on x_J, and what remains of H is its Schur complement. Channels are then taken
one by one, each where it takes away most. U for given channels is the whitened problem in what
remains; doing both in turn (as OATS does, arXiv 2409.13652) never raises the error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gram import full_precision, safe_root
from .svd import balance, compute_dtype, output_basis

ROUNDS = 5  # of channels and low rank in turn
FLOOR = 1e-10  # of the largest diagonal entry of H: a channel that is below has no input of its own


class ColumnParts(NamedTuple):
    """W (out, in) ≈ up · down, plus `columns` at `inputs`.

    Attributes:
        up, down: (out, r), (r, in), in the compute dtype.
        columns: (out, c).
        inputs: (c,) int64, ascending.
    """

    up: Tensor
    down: Tensor
    columns: Tensor
    inputs: Tensor


def low_rank_sparse(
    weight: Tensor,
    rank: int,
    count: int,
    gram: Tensor | None = None,
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> ColumnParts:
    """Low rank and channels of little error ‖(W − L − S) H^½‖.

    Args:
        weight: W (out, in).
        rank: r in [1, min(out, in)].
        count: c in [1, in], channels.
        gram: H (in, in), or None for the identity.
        rounds: of refinement, at most, from the channels of two tails: that of rank r, and of the
            power of two below; 0: the best rank r, and the channels of its tail.
        seed: as for `factor`.
    """
    dtype = compute_dtype(min(weight.shape))
    matrix = weight.detach().to(dtype)
    metric = None if gram is None else gram.to(matrix)
    with full_precision(matrix):
        basis = output_basis(matrix, rank, metric, seed=seed)
        ranks = {rank, 2 ** (rank.bit_length() - 1)} if rounds else {rank}
        candidates = [
            _refined(matrix, basis, start, count, metric, rounds) for start in sorted(ranks)
        ]
        _, basis, index = min(candidates, key=lambda each: each[0])
        rest = _beyond(matrix, basis)
        index = index.sort().values
        up, down = balance(basis, basis.T @ matrix)
        return ColumnParts(up, down, _columns(rest, index, metric), index)


def channels(rest: Tensor, count: int, gram: Tensor | None = None) -> Tensor:
    """The inputs (count,) whose columns take most away of ‖R H^½‖, in the order of their choice.

    Fewer are a beginning of more. Without H they are the longest columns of R, and optimal.
    """
    if gram is None:
        return rest.square().sum(0).argsort(descending=True, stable=True)[:count]
    left, shared = gram.to(rest).clone(), rest @ gram.to(rest)  # H and R H of what remains
    floor = FLOOR * left.diagonal().max()
    taken: list[int] = []
    for _ in range(count):
        own = left.diagonal()
        gain = shared.square().sum(0) / own.clamp(min=torch.finfo(own.dtype).tiny)
        gain = gain.masked_fill(own <= floor, 0.0)
        gain[taken] = -1.0
        taken.append(best := int(gain.argmax()))
        if own[best] > floor:
            row = left[best] / own[best]
            shared = shared - torch.outer(shared[:, best], row)
            left = left - torch.outer(left[:, best], row)
    return torch.tensor(taken, device=rest.device)


def remaining(gram: Tensor | None, index: Tensor, like: Tensor) -> Tensor:
    """H without all that the inputs `index` explain: its Schur complement (in, in).

    Without H, the diagonal (in,) of a mask. Dtype and device are those of `like` (out, in).
    """
    if gram is None:
        return like.new_ones(like.shape[1]).index_fill(0, index, 0.0)
    metric = gram.to(like)
    rows = metric[index]
    left = metric - rows.T @ _solved(rows[:, index], rows)
    left = (left + left.T) / 2
    return left.index_fill(0, index, 0.0).index_fill(1, index, 0.0)


def _refined(
    matrix: Tensor, basis: Tensor, start: int, count: int, metric: Tensor | None, rounds: int
) -> tuple[float, Tensor, Tensor]:
    """The error, a basis (out, r) and channels, from those of the tail of rank `start` ≤ r on."""
    index = channels(_beyond(matrix, basis[:, :start]), count, metric)
    least = _error(_beyond(matrix, basis), remaining(metric, index, matrix))
    for _ in range(rounds):
        turned = output_basis(matrix, basis.shape[1], remaining(metric, index, matrix))
        rest = _beyond(matrix, turned)
        again = channels(rest, count, metric)
        error = _error(rest, remaining(metric, again, matrix))
        if not error < least:
            break
        basis, index, least = turned, again, error
    return least, basis, index


def _beyond(matrix: Tensor, basis: Tensor) -> Tensor:
    """W − U Uᵀ W."""
    return matrix - basis @ (basis.T @ matrix)


def _columns(rest: Tensor, index: Tensor, gram: Tensor | None) -> Tensor:
    """R H[:, J] H[J, J]⁻¹ (out, c): the regression of R x on the channels."""
    if gram is None:
        return rest[:, index]
    rows = gram[index]
    return _solved(rows[:, index], rows @ rest.T).T


def _solved(inner: Tensor, right: Tensor) -> Tensor:
    """inner⁻¹ · right of a Gram matrix (c, c) that may be singular."""
    solved: Tensor = torch.cholesky_solve(right, safe_root(inner))
    return solved


def _error(rest: Tensor, metric: Tensor) -> float:
    inner = rest * metric if metric.ndim == 1 else rest @ metric
    return float((inner * rest).sum().clamp(min=0))
