"""Low rank plus entries: least squares by NumPy, what alternation gives, singular inputs."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank import linalg
from lowrank.linalg.masked import on_mask

from .oracle import grams


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def gram(inner: int, tokens: int = 200, seed: int = 0) -> Tensor:
    """Correlated inputs of unlike sizes."""
    rows = normal(tokens, inner, seed=seed) @ (normal(inner, inner, seed=seed + 1) / inner**0.5)
    rows = rows * torch.linspace(0.3, 3, inner, dtype=torch.float64)
    return rows.T @ rows / tokens


def error(weight: Tensor, parts: linalg.MaskedParts, metric: Tensor) -> float:
    return linalg.squared_error(weight, parts.up @ parts.down + parts.sparse, metric)


def by_turns(weight: Tensor, rank: int, count: int, metric: Tensor, rounds: int) -> float:
    """The error of SVD and thresholding in turn, scaled by the inputs' sizes, by NumPy."""
    scale = np.sqrt(metric.diagonal().numpy())
    target = weight.numpy() * scale
    sparse = np.zeros_like(target)
    for _ in range(rounds):
        left, values, right = np.linalg.svd(target - sparse, full_matrices=False)
        low = (left[:, :rank] * values[:rank]) @ right[:rank]
        rest = target - low
        least = np.sort(np.abs(rest), axis=None)[-count]
        sparse = np.where(np.abs(rest) >= least, rest, 0)
    away = (target - low - sparse) / scale
    return float(np.trace(away @ metric.numpy() @ away.T))


def test_values_on_a_mask_are_least_squares() -> None:
    """Row by row by NumPy's lstsq; a row without an entry stays zero."""
    target, metric = normal(9, 12), gram(12)
    mask = normal(9, 12, seed=5) > 0.3
    mask[4] = False
    found = on_mask(target, metric, mask, torch.zeros_like(target), steps=60)
    values, vectors = np.linalg.eigh(metric.numpy())
    root = (vectors * np.sqrt(values)) @ vectors.T
    for row in range(9):
        kept = mask[row].numpy()
        want = np.zeros(12)
        want[kept] = np.linalg.lstsq(root[kept].T, root @ target[row].numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[row], want, atol=1e-8)


@pytest.mark.parametrize(("rank", "count"), [(1, 300), (4, 300), (4, 900)])
def test_it_is_nearer_than_svd_and_thresholding_in_turn(rank: int, count: int) -> None:
    """And iterations help: the mask of what the best rank leaves is where it starts."""
    weight, metric = normal(40, 30), gram(30)
    fit = partial(linalg.low_rank_masked, weight, rank, linalg.largest(count), metric)
    errors = [error(weight, fit(iterations=n), metric) for n in (0, 16, 80)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.8 * by_turns(weight, rank, count, metric, rounds=80)


def test_both_parts_are_what_they_say() -> None:
    """As many entries as asked for, rank r beside them, each nearly the best for the other."""
    weight, metric = normal(20, 30), gram(30)
    parts = linalg.low_rank_masked(weight, 3, linalg.largest(150), metric)
    assert int(parts.mask.sum()) == 150
    assert bool((parts.sparse[~parts.mask] == 0).all())
    assert (parts.up.shape, parts.down.shape) == ((20, 3), (3, 30))
    low = parts.up @ parts.down
    slope = ((weight - low - parts.sparse) @ metric)[parts.mask]
    assert float(slope.abs().max()) < 1e-6
    up, down = linalg.factor(weight - parts.sparse, 3, metric)
    best = linalg.squared_error(weight - parts.sparse, up @ down, metric)
    assert error(weight, parts, metric) <= best * (1 + 1e-3)


def test_without_a_metric_it_is_that_of_the_identity() -> None:
    weight = normal(12, 10)
    one = linalg.low_rank_masked(weight, 2, linalg.largest(30))
    other = linalg.low_rank_masked(weight, 2, linalg.largest(30), torch.eye(10).double())
    assert torch.equal(one.sparse, other.sparse)
    rest = weight - one.up @ one.down
    assert torch.equal(one.mask, linalg.largest(30)(rest.abs()))
    torch.testing.assert_close(one.sparse[one.mask], rest[one.mask])


@pytest.mark.parametrize("name", grams(10))
def test_any_metric_gives_numbers(name: str) -> None:
    """Singular ones too, and never more than the best low rank alone loses."""
    metric = torch.from_numpy(np.asarray(grams(10)[name]))
    weight = normal(12, 10)
    parts = linalg.low_rank_masked(weight, 2, linalg.largest(30), metric)
    assert bool(parts.sparse.isfinite().all())
    assert bool(parts.up.isfinite().all() and parts.down.isfinite().all())
    up, down = linalg.factor(weight, 2, metric)
    alone = linalg.squared_error(weight, up @ down, metric)
    assert error(weight, parts, metric) <= alone * (1 + 1e-6) + 1e-9 * float(metric.trace())


def test_an_input_that_is_always_zero_gets_no_entry() -> None:
    weight, metric = normal(12, 10), gram(10)
    metric[3], metric[:, 3] = 0, 0
    parts = linalg.low_rank_masked(weight, 2, linalg.largest(60), metric)
    assert not bool(parts.mask[:, 3].any())


def test_zeros_stay_zeros_and_seeds_repeat() -> None:
    metric = gram(10)
    parts = linalg.low_rank_masked(torch.zeros(8, 10).double(), 2, linalg.largest(20), metric)
    assert float((parts.up @ parts.down + parts.sparse).abs().max()) == 0
    weight = normal(8, 10)
    keep = partial(linalg.nm_mask, n=2, m=4)
    one, other = (linalg.low_rank_masked(weight, 2, keep, metric) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert int(one.mask[:, :8].view(8, 2, 4).sum(-1).max()) == 2
