"""Low-rank token tables: E (V, D), one row per token, approximated in a subspace of its D columns.

The norm is that of the outputs: with token frequencies p_t it is Σ_t p_t ‖δ_t‖² for the rows δ_t of
E − Ê. A table tied to the output head also gives logits E h, whose errors δ_t·h are weighted by the
same p_t: to second order, the KL weights a logit by its token's probability. Both parts then share
the row weights, and the sum

    ‖P^½ (E − Ê) C^½‖_F²,   P = diag(p),   C = ¾ I + ¼ H · D / tr H,   H = E[h hᵀ]

has a closed-form optimum: with V_k the leading eigenvectors of M = C^½ Eᵀ P E C^½ it is
Ê = (E C^½ V_k)(C^{-½} V_k)ᵀ. Rows are projected, never divided by √p, so that unseen tokens do no
harm and zero rows (padding) stay exactly zero; C ⪰ ¾ I bounds C^{-½}.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import full_precision
from .svd import balance, compute_dtype

CHUNK = 8192  # rows cast at once
EVEN = 0.5  # of the mean count, added to every count
HEAD = 0.25  # the head's share in the norm of a tied table; see benchmarks/embeddings.py


def token_weights(freq: Tensor) -> Tensor:
    """p (V,) float64 from counts; half the mean count is added to each.

    A third of the weight is thus spread evenly: counts of rare tokens are mostly noise, and tokens
    absent from the calibration still matter.
    """
    counts = freq.double()
    counts = counts + EVEN * counts.mean().clamp(min=1e-300)
    share: Tensor = counts / counts.sum()
    return share


def output_metric(gram: Tensor | None, columns: int) -> Tensor | None:
    """C (D, D) float64 from the head's E[h hᵀ]; None (the identity) without a head."""
    scale = 0.0 if gram is None else float(gram.diagonal().sum())
    if gram is None or scale <= 0:
        return None
    eye = torch.eye(columns, dtype=torch.float64, device=gram.device)
    metric: Tensor = (1 - HEAD) * eye + HEAD * gram.double() * (columns / scale)
    return metric


def row_moments(table: Tensor, weights: Tensor | None = None) -> Tensor:
    """Eᵀ diag(weights) E, (D, D) in the compute dtype; None for weights of 1."""
    dtype = compute_dtype(table.shape[1])
    total = table.new_zeros((table.shape[1], table.shape[1]), dtype=dtype)
    with full_precision(table):
        for start in range(0, len(table), CHUNK):
            rows = table[start : start + CHUNK].detach().to(dtype)
            scaled = rows
            if weights is not None:
                scaled = rows * weights[start : start + CHUNK].to(rows)[:, None]
            total += rows.T @ scaled
    return (total + total.T) / 2


def token_energies(
    table: Tensor,
    weights: Tensor | None = None,
    metric: Tensor | None = None,
    *,
    seen_in: Tensor | None = None,
) -> Tensor:
    """Energy of each component, (min(V, D),) float64: the tails are the errors.

    Args:
        metric: C that defines the components; energies descend in it.
        seen_in: another metric, to measure the components of C = I in; their order may differ.
    """
    with full_precision(table):
        half = None if metric is None else _root(metric)[0]
        values, vectors = torch.linalg.eigh(_between(row_moments(table, weights), half))
        if seen_in is not None:
            values = values * ((seen_in.to(vectors) @ vectors) * vectors).sum(0)
    energy: Tensor = values.double().clamp(min=0).flip(0)
    return energy[: min(table.shape)]


def factor_tokens(
    table: Tensor, rank: int, weights: Tensor | None = None, metric: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors of E in the norm ‖P^½ · C^½‖.

    Args:
        table: E (V, D).
        weights: p (V,), or None for ones.
        metric: C (D, D), positive definite, or None for the identity.

    Returns:
        rows (V, rank) and down (rank, D) in the compute dtype, balanced and sign-fixed. Zero rows
        of E stay exactly zero.
    """
    with full_precision(table):
        half, inverse = (None, None) if metric is None else _root(metric)
        moments = row_moments(table, weights)
        vectors = torch.linalg.eigh(_between(moments, half)).eigenvectors[:, -rank:].flip(1)
        vectors = vectors * _signs(vectors)
        inner = vectors if half is None else half.to(vectors) @ vectors
        outer = vectors if inverse is None else inverse.to(vectors) @ vectors
        return balance(table.detach().to(vectors.dtype) @ inner, outer.T)


def token_error(
    difference: Tensor, weights: Tensor | None = None, metric: Tensor | None = None
) -> float:
    """‖P^½ (E − Ê) C^½‖² in float64, for the difference (V, D)."""
    moments = row_moments(difference.double(), weights)
    product = moments if metric is None else moments * metric.to(moments)
    return float((product.diagonal() if metric is None else product).sum().clamp(min=0))


def _between(moments: Tensor, half: Tensor | None) -> Tensor:
    """C^½ · moments · C^½, symmetric."""
    if half is None:
        return moments
    metric = half.to(moments) @ moments @ half.to(moments)
    return (metric + metric.T) / 2


def _root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """C^½ and C^{-½} of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp(min=torch.finfo(values.dtype).eps).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _signs(vectors: Tensor) -> Tensor:
    """Signs that make each column's entry of largest magnitude positive."""
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return torch.where(signs == 0, 1, signs)
