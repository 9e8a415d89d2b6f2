"""Inner products of shorter vectors: the optimum, its limits, and recall where queries differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank import LowrankError, project_vectors
from lowrank.linalg.vectors import VectorProjection

WIDE = 24


def rows(count: int, seed: int, *, turned: bool = False) -> Tensor:
    """Vectors of falling energy; turned, of energy in other directions."""
    draw = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, WIDE + 1).float() ** -0.7
    basis = torch.linalg.qr(torch.randn(WIDE, WIDE, generator=torch.Generator().manual_seed(9))).Q
    found = torch.randn(count, WIDE, generator=draw) * scale
    return (found @ basis if turned else found).double()


BASE, QUERIES = rows(600, 0), rows(400, 1, turned=True)


def loss(base_map: Tensor, query_map: Tensor) -> float:
    exact, short = QUERIES @ BASE.T, (QUERIES @ query_map.T) @ (BASE @ base_map.T).T
    return float((exact - short).square().sum() / exact.square().sum())


def recall(found: VectorProjection, count: int = 10) -> float:
    asked = rows(300, 2, turned=True)
    exact = (asked @ BASE.T).topk(count).indices
    short = (found.of_queries(asked) @ found.of_base(BASE).T).topk(count).indices
    return float((exact[:, :, None] == short[:, None]).any(-1).double().mean())


@pytest.mark.parametrize("dim", [1, 6, WIDE])
def test_the_error_is_the_least_there_is(dim: int) -> None:
    found = project_vectors(BASE, QUERIES, dim, damp=0)
    assert found.base.shape == found.queries.shape == (dim, WIDE)
    values = np.linalg.svd((QUERIES @ BASE.T).numpy(), compute_uv=False)[:WIDE] ** 2
    best = values[dim:].sum() / values.sum()  # Eckart–Young for all inner products at once
    assert found.error == pytest.approx(best, rel=1e-6, abs=1e-12)
    assert loss(found.base, found.queries) == pytest.approx(best, rel=1e-6, abs=1e-12)


def test_it_is_the_two_sided_factorisation_of_the_identity() -> None:
    found = project_vectors(BASE, QUERIES, 6, damp=0.1)
    gram, asked = BASE.T @ BASE / len(BASE), QUERIES.T @ QUERIES / len(QUERIES)
    values, vectors = torch.linalg.eigh(asked + 0.1 * asked.diagonal().mean() * torch.eye(WIDE))
    half = (vectors * values.sqrt()) @ vectors.T
    left, size, right = torch.linalg.svd(half @ torch.linalg.cholesky(gram))
    core = (left[:, :6] * size[:6]) @ right[:6]
    wanted = torch.linalg.solve(half, core) @ torch.linalg.inv(torch.linalg.cholesky(gram))
    torch.testing.assert_close(found.queries.T @ found.base, wanted, rtol=1e-6, atol=1e-8)


def test_queries_like_the_base_give_its_pca() -> None:
    found = project_vectors(BASE, BASE, 6, damp=0)
    top = torch.linalg.eigh(BASE.T @ BASE).eigenvectors[:, -6:]
    torch.testing.assert_close(found.queries.T @ found.base, top @ top.T, rtol=1e-6, atol=1e-8)


def test_recall_of_other_queries_is_above_that_of_pca() -> None:
    top = torch.linalg.eigh(BASE.T @ BASE).eigenvectors[:, -6:].T
    ours, pca = project_vectors(BASE, QUERIES, 6), VectorProjection(top, top, 0.0)
    assert recall(ours) > recall(pca) + 0.1
    assert recall(project_vectors(BASE, QUERIES, WIDE)) == 1.0
    far = project_vectors(BASE, QUERIES, 6, damp=1e6)
    torch.testing.assert_close(far.queries.T @ far.base, top.T @ top, rtol=1e-3, atol=1e-3)


def test_damping_helps_where_queries_are_few() -> None:
    damped, plain = (project_vectors(BASE, QUERIES[:10], 6, damp=damp) for damp in (0.1, 0))
    assert recall(damped) > recall(plain) + 0.03
    losses = [loss(found.base, found.queries) for found in (damped, plain)]
    assert losses[0] < 0.9 * losses[1]


def test_components_are_in_order_and_dtypes_are_those_of_the_vectors() -> None:
    long, short = project_vectors(BASE, QUERIES, 8), project_vectors(BASE, QUERIES, 3)
    cut = long.queries[:3].T @ long.base[:3]
    torch.testing.assert_close(cut, short.queries.T @ short.base, rtol=1e-6, atol=1e-8)
    assert long.of_base(BASE.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"dim": 0}, r"dim must be in \[1, 24\], got 0"),
        ({"dim": WIDE + 1}, r"dim must be in \[1, 24\], got 25"),
        ({"queries": torch.ones(3, 5)}, "queries must be 24 wide as base is, got 5"),
        ({"base": torch.ones(3)}, r"base must be rows of numbers .*\(3,\)"),
        ({"base": torch.ones(3, WIDE, dtype=torch.int64)}, "base must be rows of numbers"),
        ({"queries": torch.full((3, WIDE), torch.nan)}, "queries holds NaN or Inf"),
        ({"damp": -1}, "damp must be a finite number of at least 0, got -1"),
    ],
)
def test_what_cannot_be(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(LowrankError, match=said):
        project_vectors(**{"base": BASE, "queries": QUERIES, "dim": 4, **wrong})
