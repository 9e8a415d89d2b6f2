"""One input basis D (r, n) for several matrices W_i (m_i, n) applied to the same input.

min Σ_i ‖(W_i − U_i D) H^½‖_F² over D and all U_i is the low-rank problem of the stacked matrix
W_s (Σ m_i, n): its best factors, the rows of `up` split among the members. Basis Sharing (arXiv
2410.03765) and D-Rank decompose the same matrix; see svd.py for why nothing is inverted here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .svd import compute_dtype, energies, factor


def shared_energies(
    weights: Sequence[Tensor], gram: Tensor | None = None, *, row_weights: Tensor | None = None
) -> Tensor:
    """Squared singular values of W_s H^½, descending, (min(Σ m_i, n),) float64.

    Their tails are the errors Σ_i of all ranks. Arguments as for `factor_shared`.
    """
    return energies(_stacked(weights, row_weights), gram)


def factor_shared(
    weights: Sequence[Tensor],
    rank: int,
    gram: Tensor | None = None,
    *,
    row_weights: Tensor | None = None,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """The best factors with one input basis, in the norm Σ_i ‖P_i^½ (· ) H^½‖².

    Args:
        weights: W_i (m_i, n).
        rank: in [1, min(Σ m_i, n)].
        gram: H (n, n), the second moment of the shared input; None for the identity.
        row_weights: (Σ m_i,) > 0, the diagonal of P: weight of each output's error; None for ones.
        seed: as for `factor`.

    Returns:
        U_i (m_i, rank) in the order of `weights` and D (rank, n), in the compute dtype.
    """
    up, down = factor(_stacked(weights, row_weights), rank, gram, seed=seed)
    if row_weights is not None:
        up = up / row_weights.to(up).sqrt()[:, None]
    return list(torch.split(up, [len(weight) for weight in weights])), down


def _stacked(weights: Sequence[Tensor], row_weights: Tensor | None) -> Tensor:
    """P^½ W_s (Σ m_i, n), a copy."""
    rows = torch.cat([weight.detach() for weight in weights])
    if row_weights is None:
        return rows
    rows = rows.to(compute_dtype(min(rows.shape)))
    return rows * row_weights.to(rows).sqrt()[:, None]
