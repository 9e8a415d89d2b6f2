"""Generalized Nyström: its formula, how near it comes, and what truncation and scales add."""

from __future__ import annotations

from statistics import median

import numpy as np
import pytest
import torch

from lowrank import linalg
from lowrank.linalg.nystrom import generalized_nystrom, leading_errors, ordered

from ..draws import falling, normal


def metric(side: int) -> torch.Tensor:
    rows = normal(90, side, seed=5) @ (normal(side, side, seed=6) * torch.logspace(0, -2, side))
    return rows.T @ rows / 90


def test_it_is_the_formula_with_a_pseudo_inverse() -> None:
    weight = normal(30, 24, seed=1)
    up, down = generalized_nystrom(weight, 5, oversample=3, seed=4)
    rng = torch.Generator().manual_seed(4)
    x, y = (torch.randn(*s, generator=rng, dtype=torch.float64).numpy() for s in [(24, 5), (30, 8)])
    w = weight.numpy()
    want = w @ x @ np.linalg.pinv(y.T @ w @ x) @ y.T @ w
    np.testing.assert_allclose((up @ down).numpy(), want, atol=1e-10)


@pytest.mark.parametrize(("oversample", "expected"), [(10, 2.85), (20, 2.28)])
def test_distance_from_the_optimum(oversample: int, expected: float) -> None:
    """σ_k = 1/k, rank 20. Without oversampling it is several times as far."""
    weight, best = falling(400, 300, 20, 0)

    def away(more: int, seed: int) -> float:
        up, down = generalized_nystrom(weight, 20, oversample=more, seed=seed)
        return float((weight - up @ down).norm()) / best

    assert median(away(oversample, seed) for seed in range(7)) == pytest.approx(expected, rel=0.08)
    assert median(away(0, seed) for seed in range(7)) > 5


def test_a_randomised_svd_is_nearer() -> None:
    """It reads W again: 1.023 with one power iteration."""
    weight, best = falling(400, 300, 20, 0)
    basis = linalg.randomised_basis(weight, 20, oversample=5, power=1)
    assert 1 < float((weight - basis @ (basis.T @ weight)).norm()) / best < 1.023


def test_drawn_like_the_inputs_it_is_nearer_in_their_norm() -> None:
    weight, gram = normal(30, 24, seed=1), metric(24)

    def away(given: torch.Tensor | None) -> float:
        found = [generalized_nystrom(weight, 8, given, oversample=4, seed=s) for s in range(5)]
        return sum(linalg.squared_error(weight, up @ down, gram) for up, down in found)

    assert away(gram) < 0.5 * away(None)


@pytest.mark.parametrize("whitened", [False, True])
def test_ordered_components_fall_and_have_their_best_scales(whitened: bool) -> None:
    """No other scale of any component brings the sum of the first r nearer."""
    weight, gram = normal(30, 24, seed=1), metric(24) if whitened else None
    up, down = ordered(weight, *generalized_nystrom(weight, 12, gram, oversample=2), gram)
    half = np.eye(24) if gram is None else np.linalg.cholesky(gram.numpy())
    errors = leading_errors(weight, up, down, gram)
    total = np.square(weight.numpy() @ half).sum()
    falls = -np.diff(errors.numpy())
    assert (falls > 0).all()
    assert (np.diff(falls) < 1e-12 * total).all()  # the nearest first
    for rank in (0, 1, 5, 12):
        rest = (weight - up[:, :rank] @ down[:rank]).numpy() @ half
        assert float(errors[rank]) == pytest.approx(np.square(rest).sum(), rel=1e-10)
        for j in range(rank):
            part = np.outer(up[:, j], down[j]) @ half
            assert abs((rest * part).sum()) < 1e-10 * total


def test_a_flat_spectrum_is_no_farther_than_zero() -> None:
    """As the sketches alone give it, it is."""
    weight = torch.linalg.qr(normal(40, 40, seed=3)).Q
    up, down = generalized_nystrom(weight, 20, oversample=2)
    assert float(leading_errors(weight, up, down)[20]) > 40
    assert float(leading_errors(weight, *ordered(weight, up, down))[20]) < 30


@pytest.mark.parametrize("rank", [0, 3])
def test_more_components_than_the_weight_has_are_zero(rank: int) -> None:
    weight = normal(12, rank, seed=1) @ normal(rank, 15, seed=2)
    up, down = generalized_nystrom(weight, 6, oversample=3)
    assert float(down[rank:].abs().sum()) == 0
    assert bool((up.norm(dim=0) > 0).all())
    torch.testing.assert_close(up @ down, weight, atol=1e-12, rtol=0)
    up, down = ordered(weight, up, down)
    torch.testing.assert_close(up[:, :rank] @ down[:rank], weight, atol=1e-12, rtol=0)
