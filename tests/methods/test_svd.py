"""Plain SVD: the nearest matrix, and the spectrum that NumPy finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.methods import SVD
from lowrank.types import Statistics

from .layers import at_rank, linear, site, weight_error

SHAPES = [(12, 20), (20, 12), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_curve_and_spectrum_are_those_of_numpy(shape: tuple[int, int]) -> None:
    for seed in range(3):
        layer = linear(*shape, seed)
        values = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False)
        curve = SVD().curve(site(layer), Statistics())
        assert curve.norm == "weight"
        assert curve.exact
        np.testing.assert_allclose(curve.spectrum.numpy(), values, atol=1e-12 * values[0])
        for option in curve.options[:-1]:
            tail = (values[option.size[0] :] ** 2).sum()
            assert option.error == pytest.approx(tail, abs=1e-12 * curve.total)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_factors_of_that_rank_are_nearer(shape: tuple[int, int]) -> None:
    layer = linear(*shape)
    option = at_rank(SVD().curve(site(layer), Statistics()), 3)
    new = SVD().factor(layer, option, Statistics())
    best = weight_error(layer, new)
    rng = torch.Generator().manual_seed(0)
    for size in (1e-1, 1e-3):
        for _ in range(5):
            for weight in (new.down.weight, new.up.weight):
                kept = weight.detach().clone()
                with torch.no_grad():
                    weight += size * torch.randn(weight.shape, generator=rng).double()
                    assert weight_error(layer, new) > best
                    weight.copy_(kept)


def test_statistics_are_not_looked_at() -> None:
    layer = linear(12, 20)
    stats = Statistics(5, torch.full((2, 2), float("nan")), None)
    assert SVD.needs == frozenset()
    assert SVD().curve(site(layer), stats).options == SVD().curve(site(layer), Statistics()).options


def test_scaling_the_weight_scales_the_curve() -> None:
    layer = linear(12, 20)
    before = SVD().curve(site(layer), Statistics())
    with torch.no_grad():
        layer.weight *= 4
    after = SVD().curve(site(layer), Statistics())
    np.testing.assert_allclose(after.spectrum, before.spectrum * 4)
    errors = [[option.error for option in curve.options] for curve in (before, after)]
    np.testing.assert_allclose(errors[1], np.array(errors[0]) * 16)
