"""Shorter vectors for search by inner product, where queries differ from what is searched.

min E (qᵀ Aᵀ B x − qᵀ x)² over maps A, B (d, D), for queries q and vectors x: the best rank-d matrix
in the place of the identity, in the metrics of both sides (LeanVec, arXiv 2312.16335, whose A and B
have orthonormal rows and are found by iterations; without that constraint the optimum is closed,
and is what LeanVec-Sphering of arXiv 2410.22347 computes).

    ‖S (M − I) H^½‖,  SᵀS = E[q qᵀ],  H = E[x xᵀ],  M = Aᵀ B

Queries that are distributed as the vectors give the PCA of these, without centring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import LowrankError
from .gram import DAMP, gram_sum, output_root, unrooted
from .svd import balance, factor


@dataclass(frozen=True)
class VectorProjection:
    """Maps to fewer dimensions, between which inner products are nearly those of before.

    Attributes:
        base: B (d, D), for the vectors that are searched.
        queries: A (d, D), for queries.
        error: E (qᵀ x − (A q)ᵀ B x)² / E (qᵀ x)² over all pairs that it was fitted to.
    """

    base: Tensor
    queries: Tensor
    error: float

    def of_base(self, vectors: Tensor) -> Tensor:
        """B x: (…, D) -> (…, d), in the dtype of the vectors."""
        return vectors @ self.base.to(vectors).T

    def of_queries(self, vectors: Tensor) -> Tensor:
        """A q: (…, D) -> (…, d), in the dtype of the vectors."""
        return vectors @ self.queries.to(vectors).T


def project_vectors(
    base: Tensor, queries: Tensor, dim: int, *, damp: float = DAMP
) -> VectorProjection:
    """Two linear maps to `dim` dimensions, one for the vectors and one for queries (LeanVec).

    To rank by inner product, `base` may be centred first, by which no ranking changes.

    Args:
        base: (n, D), what is searched, or a sample of it.
        queries: (m, D), such as will be asked; never those that recall is measured on.
        dim: d <= D. The first components of a projection are those of a shorter one.
        damp: how much of the mean of E[q qᵀ]'s diagonal is added to it, for what the sample of
            queries does not show; 0 for the optimum on the sample. The larger, the nearer to the
            PCA of the base.

    Returns:
        Both maps, float64.

    Raises:
        LowrankError: shapes that do not go together, or NaN and Inf.
    """
    base, queries = _checked("base", base), _checked("queries", queries)
    wide = base.shape[1]
    if queries.shape[1] != wide:
        raise LowrankError(f"queries must be {wide} wide as base is, got {queries.shape[1]}")
    if not 1 <= dim <= wide:
        raise LowrankError(f"dim must be in [1, {wide}], got {dim}")
    if not 0 <= damp < float("inf"):
        raise LowrankError(f"damp must be a finite number of at least 0, got {damp}")
    gram, asked = gram_sum(base) / len(base), gram_sum(queries) / len(queries)
    asked = asked.to(gram.device)
    root = output_root(asked, damp)
    up, down = factor(root, dim, gram)  # of S · I
    up, down = balance(unrooted(root, up), down)
    lost = up @ down - torch.eye(wide, dtype=up.dtype, device=up.device)
    whole = float((asked * gram).sum())
    error = float((lost @ gram @ lost.T * asked).sum()) / whole if whole > 0 else 0.0
    return VectorProjection(down, up.T.contiguous(), max(error, 0.0))


def _checked(name: str, vectors: Any) -> Tensor:
    vectors = torch.as_tensor(vectors).detach()
    if vectors.ndim != 2 or not vectors.is_floating_point() or not vectors.numel():
        shape = tuple(vectors.shape)
        raise LowrankError(f"{name} must be rows of numbers (n, D), got {vectors.dtype} {shape}")
    if not bool(vectors.isfinite().all()):
        raise LowrankError(f"{name} holds NaN or Inf")
    rows: Tensor = vectors
    return rows
