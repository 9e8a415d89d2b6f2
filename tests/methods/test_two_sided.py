"""Two-sided SVD: the nearest outputs where nearness is what the loss makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowrank.errors import LowrankError
from lowrank.methods import TwoSided, Whitened
from lowrank.nn import LowRankLinear
from lowrank.types import Statistics

from .layers import at_rank, linear, site, two_sides

SHAPES = [(12, 20), (20, 12), (16, 16)]


def roots(stats: Statistics, damp: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the damped G and of H, by NumPy."""
    outer = stats.out_gram.numpy()
    outer = outer + damp * np.trace(outer) / len(outer) * np.eye(len(outer))
    return np.linalg.cholesky(outer).T, np.linalg.cholesky(stats.gram.numpy())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damp", [0.01, 0.1, 0.3])
def test_every_rank_is_the_optimum_of_both_norms(shape: tuple[int, int], damp: float) -> None:
    method = TwoSided(damp=damp)
    for seed in range(2):
        layer, stats = linear(*shape, seed), two_sides(shape, seed)
        left, right = roots(stats, damp)
        weight = layer.weight.detach().numpy()
        values = np.linalg.svd(left @ weight @ right, compute_uv=False) ** 2
        curve = method.curve(site(layer), stats)
        assert (curve.norm, curve.exact) == ("fisher", True)
        assert curve.total == pytest.approx(values.sum(), rel=1e-10)
        for rank in (1, 3, 5):
            option = at_rank(curve, rank)
            new = method.factor(layer, option, stats).dense_weight().detach()
            error = ((left @ (weight - new.numpy()) @ right) ** 2).sum()
            assert error == pytest.approx(values[rank:].sum(), abs=1e-9 * values.sum())
            assert option.error == pytest.approx(error, abs=1e-9 * values.sum())
            measured = method.error(layer, new, stats)
            assert measured == pytest.approx(error, abs=1e-9 * values.sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_that_count_alike_make_it_whitened(shape: tuple[int, int]) -> None:
    layer, stats = linear(*shape), two_sides(shape)
    for outer in (torch.eye(shape[0]) * 5, torch.zeros(shape[0], shape[0])):
        alike = replace(stats, out_gram=outer.double())
        option = at_rank(Whitened().curve(site(layer), stats), 4)
        one, two = (m.factor(layer, option, alike).dense_weight() for m in (TwoSided(), Whitened()))
        torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


def test_much_damping_leads_to_whitened_and_little_away_from_it() -> None:
    layer, stats = linear(12, 20), two_sides((12, 20))
    option = at_rank(Whitened().curve(site(layer), stats), 4)
    want = Whitened().factor(layer, option, stats).dense_weight()
    ways = [TwoSided(damp=damp) for damp in (1e6, 1.0, 1e-3)]
    found = [way.factor(layer, option, stats).dense_weight() for way in ways]
    off = [float((weight - want).detach().norm()) for weight in found]
    assert off[0] < 1e-4 < off[1] < off[2]


def test_components_are_balanced_after_the_root_is_taken_off() -> None:
    layer, stats = linear(12, 20), two_sides((12, 20))
    new = TwoSided().factor(layer, at_rank(TwoSided().curve(site(layer), stats), 4), stats)
    assert isinstance(new, LowRankLinear)
    torch.testing.assert_close(new.up.weight.norm(dim=0), new.down.weight.norm(dim=1))


@pytest.mark.parametrize("damp", [0.0, -0.1, float("nan"), float("inf")])
def test_a_damping_that_leaves_no_root_is_refused(damp: float) -> None:
    with pytest.raises(LowrankError, match="damp must be a finite number above 0, got"):
        TwoSided(damp=damp)
