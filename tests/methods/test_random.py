"""Random factors: the trained weight is given up, its scale and its bias are kept."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from lowrank.methods import Random
from lowrank.types import Cost, Option, Statistics

from .layers import linear, site


def option(rank: int) -> Option:
    return Option("random", (rank,), "factors", Cost(1, 1, 1), 0.0)


def drawn(layer: torch.nn.Linear, rank: int = 4, seed: int = 0) -> torch.Tensor:
    return Random(seed).factor(layer, option(rank), Statistics()).dense_weight().detach()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_entries_have_the_variance_of_the_weights(rank: int, scale: float) -> None:
    layer = linear(90, 120)
    with torch.no_grad():
        layer.weight *= scale
    found = [float(drawn(layer, rank, seed).square().mean()) for seed in range(8)]
    want = float(layer.weight.detach().square().mean())
    assert np.mean(found) == pytest.approx(want, rel=0.15)


def test_the_bias_is_kept() -> None:
    layer = linear(6, 9)
    assert torch.equal(Random().factor(layer, option(2), Statistics()).bias, layer.bias)


def test_one_seed_gives_different_layers_different_numbers() -> None:
    layer = linear(6, 9)
    first = drawn(layer)
    assert torch.equal(first, drawn(copy.deepcopy(layer)))
    assert not torch.equal(first, drawn(layer, seed=1))
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.weight[5, 8] += 1e-3  # the last number counts, too
    other = drawn(changed)
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), other.flatten(), dim=0)
    assert abs(float(cosine)) < 0.6


def test_a_zero_weight_stays_zero_and_can_be_trained() -> None:
    layer = linear(6, 9)
    with torch.no_grad():
        layer.weight.zero_()
    new = Random().factor(layer, option(2), Statistics())
    assert not new.dense_weight().any()
    new(torch.ones(9, dtype=torch.float64)).sum().backward()
    assert new.up.weight.grad.any()


def test_the_curve_is_a_bound_and_says_so() -> None:
    """Mean error of W projected on a random subspace of that rank."""
    layer = linear(10, 14)
    curve = Random().curve(site(layer), Statistics())
    assert not curve.exact
    assert curve.spectrum is None
    weight = layer.weight.detach().numpy()
    rng = np.random.default_rng(0)
    for rank in (1, 3, 5):
        errors = []
        for _ in range(400):
            basis = np.linalg.qr(rng.standard_normal((10, rank)))[0]
            errors.append(((weight - basis @ (basis.T @ weight)) ** 2).sum())
        planned = next(o.error for o in curve.options if o.size == (rank,))
        assert planned == pytest.approx(np.mean(errors), rel=0.05)


def test_the_sign_bit_of_a_seed_is_no_trouble() -> None:
    layer = linear(6, 9)
    assert not torch.equal(drawn(layer, seed=-1), drawn(layer, seed=2**40))
