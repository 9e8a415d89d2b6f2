"""ASVD: the factors of the authors' formula, without their inverse, and an exact output error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.errors import LowrankError
from lowrank.methods import ASVD, SVD, Whitened
from lowrank.types import Statistics

from .layers import at_rank, inputs, linear, output_error, site, statistics

SHAPES = [(12, 20), (20, 12), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_it_is_the_svd_of_the_scaled_weight_scaled_back(
    shape: tuple[int, int], alpha: float
) -> None:
    layer, rows = linear(*shape), inputs(shape[1])
    stats = statistics(rows)
    weight = layer.weight.detach().numpy()
    scale = np.mean(rows.numpy() ** 2, axis=0) ** (alpha / 2)
    left, values, right = np.linalg.svd(weight * scale, full_matrices=False)
    method = ASVD(alpha=alpha)
    for rank in (1, 4):
        option = at_rank(method.curve(site(layer), stats), rank)
        want = (left[:, :rank] * values[:rank]) @ right[:rank] / scale
        got = method.factor(layer, option, stats).dense_weight().detach().numpy()
        np.testing.assert_allclose(got, want, atol=1e-9 * np.abs(want).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_curve_is_what_running_both_layers_shows(shape: tuple[int, int], alpha: float) -> None:
    layer, rows = linear(*shape), inputs(shape[1])
    stats, method = statistics(rows), ASVD(alpha=alpha)
    curve = method.curve(site(layer), stats)
    assert (curve.norm, curve.exact) == ("output", True)
    for option in curve.options[:-1]:
        seen = output_error(layer, method.factor(layer, option, stats), rows)
        assert seen == pytest.approx(option.error, abs=1e-9 * curve.total)


def test_at_the_ends_it_is_plain_svd_and_with_uncorrelated_inputs_the_optimum() -> None:
    layer = linear(12, 20)
    gram = torch.diag(torch.logspace(-2, 2, 20, dtype=torch.float64))
    stats = Statistics(9, gram)
    for method, other in ((ASVD(alpha=0), SVD()), (ASVD(alpha=1), Whitened())):
        option = at_rank(method.curve(site(layer), stats), 4)
        one, two = (m.factor(layer, option, stats).dense_weight() for m in (method, other))
        torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_lies_between_plain_svd_and_the_optimum_where_inputs_differ_in_size(
    shape: tuple[int, int],
) -> None:
    layer = linear(*shape)
    rows = inputs(shape[1]) * torch.logspace(1, -1, shape[1], dtype=torch.float64)
    stats = statistics(rows)
    option = at_rank(ASVD().curve(site(layer), stats), 4)
    plain, ours, best = (
        output_error(layer, method.factor(layer, option, stats), rows)
        for method in (SVD(), ASVD(), Whitened())
    )
    assert best < ours < plain


def test_inputs_that_are_always_zero_need_no_floor() -> None:
    layer, rows = linear(12, 20), inputs(20)
    rows[:, 5:] = 0
    stats = statistics(rows)
    curve = ASVD().curve(site(layer), stats)
    assert at_rank(curve, 5).error <= 1e-10 * curve.total
    new = ASVD().factor(layer, at_rank(curve, 5), stats)
    assert torch.isfinite(new.dense_weight()).all()


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_a_power_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(LowrankError, match=r"alpha must be in \[0, 1\], got"):
        ASVD(alpha=alpha)


def test_without_statistics_it_refuses() -> None:
    layer = linear(6, 9)
    with pytest.raises(LowrankError, match="gram of an input of width 9, got none"):
        ASVD().curve(site(layer), Statistics())
