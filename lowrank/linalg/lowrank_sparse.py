"""Low rank plus a few input channels: W ≈ U Uᵀ W + S, with S non-zero only in the columns J.

LOST (arXiv 2508.02668) trains from scratch with this split: the leading singular values make the
low-rank part, and the channels on which the others are largest are kept as columns. Its authors'
related code selects by part of the tail and copies columns of W. Ours selects by the whole tail
R = W − U UᵀW and stores the residual: without data that is R[:, J], and ‖W − L − S‖² = ‖R‖² −
‖R[:, J]‖², the optimum for c columns.

In the norm of the outputs a channel also explains inputs correlated with it: the best S is the
regression of R x on x_J, which leaves the Schur complement of H. Channels are then chosen greedily
by the error that they remove. U for given channels is the whitened problem in the Schur complement;
alternating the two (as OATS does, arXiv 2409.13652) never raises the error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gram import bounded_fit, full_precision, safe_root, unit_of
from .svd import balance, compute_dtype, output_basis

ROUNDS = 5  # alternations of channels and low rank
FLOOR = 1e-10  # of the largest diagonal entry of H: channels below are explained by others


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
    """Low rank and channels that approximately minimise ‖(W − L − S) H^½‖.

    Args:
        weight: W (out, in).
        rank: r in [1, min(out, in)].
        count: c in [1, in], channels.
        gram: H (in, in), or None for the identity.
        rounds: of alternation, at most, from the channels of two tails: that of rank r and that of
            the power of two below; 0: the best rank r and the channels of its tail.
        seed: as for `factor`.
    """
    matrix = weight.detach().to(compute_dtype(min(weight.shape)))
    matrix = matrix / (unit := unit_of(matrix))
    metric = None if gram is None else gram.to(matrix)
    with full_precision(matrix):
        parts = bounded_fit(
            matrix,
            metric,
            lambda metric: _fitted(matrix, rank, count, metric, rounds, seed),
            lambda parts: [parts.columns, parts.up @ parts.down[:, parts.inputs] + parts.columns],
        )
        up, down = balance(parts.up, parts.down * unit)
        return ColumnParts(up, down, parts.columns * unit, parts.inputs)


def _fitted(
    matrix: Tensor, rank: int, count: int, metric: Tensor | None, rounds: int, seed: int
) -> ColumnParts:
    """The parts in a metric (in, in), `up` orthonormal."""
    basis = output_basis(matrix, rank, metric, seed=seed)
    ranks = {rank, 2 ** (rank.bit_length() - 1)} if rounds else {rank}
    candidates = [_refined(matrix, basis, start, count, metric, rounds) for start in sorted(ranks)]
    _, basis, index = min(candidates, key=lambda candidate: candidate[0])
    index = index.sort().values
    columns = _columns(_beyond(matrix, basis), index, metric)
    return ColumnParts(basis, basis.T @ matrix, columns, index)


def channels(rest: Tensor, count: int, gram: Tensor | None = None) -> Tensor:
    """The inputs (count,) whose columns reduce ‖R H^½‖ most, greedily and in that order.

    A smaller count gives a prefix. Without H they are the longest columns of R, which is optimal.
    """
    if gram is None:
        return rest.square().sum(0).argsort(descending=True, stable=True)[:count]
    schur, cross = gram.to(rest).clone(), rest @ gram.to(rest)  # H and R H, less those chosen
    floor = FLOOR * schur.diagonal().max()
    chosen: list[int] = []
    for _ in range(count):
        own = schur.diagonal()
        gain = cross.square().sum(0) / own.clamp(min=torch.finfo(own.dtype).tiny)
        gain = gain.masked_fill(own <= floor, 0.0)
        gain[chosen] = -1.0
        chosen.append(best := int(gain.argmax()))
        if own[best] > floor:
            row = schur[best] / own[best]
            cross = cross - torch.outer(cross[:, best], row)
            schur = schur - torch.outer(schur[:, best], row)
    return torch.tensor(chosen, device=rest.device)


def remaining(gram: Tensor | None, index: Tensor, like: Tensor) -> Tensor:
    """The Schur complement of H (in, in): without all that the inputs `index` explain.

    Without H, a diagonal (in,) of zeros and ones. Dtype and device are those of `like` (out, in).
    """
    if gram is None:
        return like.new_ones(like.shape[1]).index_fill(0, index, 0.0)
    metric = gram.to(like)
    rows = metric[index]
    schur = metric - rows.T @ _solved(rows[:, index], rows)
    schur = (schur + schur.T) / 2
    return schur.index_fill(0, index, 0.0).index_fill(1, index, 0.0)


def _refined(
    matrix: Tensor, basis: Tensor, start: int, count: int, metric: Tensor | None, rounds: int
) -> tuple[float, Tensor, Tensor]:
    """The error, basis (out, r) and channels, from the channels of the tail of rank `start` ≤ r."""
    index = channels(_beyond(matrix, basis[:, :start]), count, metric)
    least = _error(_beyond(matrix, basis), remaining(metric, index, matrix))
    for _ in range(rounds):
        new_basis = output_basis(matrix, basis.shape[1], remaining(metric, index, matrix))
        residual = _beyond(matrix, new_basis)
        new_index = channels(residual, count, metric)
        error = _error(residual, remaining(metric, new_index, matrix))
        if not error < least:
            break
        basis, index, least = new_basis, new_index, error
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
    """inner⁻¹ · right for a Gram matrix (c, c) that may be singular."""
    solved: Tensor = torch.cholesky_solve(right, safe_root(inner))
    return solved


def _error(rest: Tensor, metric: Tensor) -> float:
    inner = rest * metric if metric.ndim == 1 else rest @ metric
    return float((inner * rest).sum().clamp(min=0))
