"""Activation-aware SVD: the layer whose outputs are nearest, whatever was seen."""

from __future__ import annotations

import pytest
import torch

from lowrank.methods import SVD, Whitened
from lowrank.types import Statistics

from .layers import at_rank, inputs, linear, output_error, site, statistics, weight_error

SHAPES = [(12, 20), (20, 12), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_method_wins_in_its_own_norm(shape: tuple[int, int]) -> None:
    for seed in range(3):
        layer, rows = linear(*shape, seed), inputs(shape[1], seed=seed)
        stats = statistics(rows)
        for rank in (1, 3, 5):
            option = at_rank(Whitened().curve(site(layer), stats), rank)
            white, plain = (m.factor(layer, option, stats) for m in (Whitened(), SVD()))
            assert output_error(layer, white, rows) < output_error(layer, plain, rows)
            assert weight_error(layer, plain) < weight_error(layer, white)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_curve_is_what_running_both_layers_shows(shape: tuple[int, int]) -> None:
    layer, rows = linear(*shape), inputs(shape[1])
    stats = statistics(rows)
    curve = Whitened().curve(site(layer), stats)
    assert curve.norm == "output"
    assert curve.exact
    outputs = rows @ layer.weight.detach().T
    assert curve.total == pytest.approx(float(outputs.square().sum(1).mean()), rel=1e-10)
    for option in curve.options[:-1]:
        seen = output_error(layer, Whitened().factor(layer, option, stats), rows)
        assert seen == pytest.approx(option.error, abs=1e-10 * curve.total)


@pytest.mark.parametrize("shape", SHAPES)
def test_with_white_inputs_it_is_plain_svd(shape: tuple[int, int]) -> None:
    layer = linear(*shape)
    stats = Statistics(9, torch.eye(shape[1], dtype=torch.float64))
    white, plain = (m.curve(site(layer), stats) for m in (Whitened(), SVD()))
    torch.testing.assert_close(white.spectrum, plain.spectrum)
    for rank in (1, 4):
        one, other = (
            m.factor(layer, at_rank(white, rank), stats).dense_weight() for m in (Whitened(), SVD())
        )
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_low_rank_are_served_without_error(shape: tuple[int, int]) -> None:
    """Three directions were seen: rank three is enough, and no inverse is needed to know it."""
    layer = linear(*shape)
    rows = inputs(shape[1])[:, :3] @ inputs(shape[1])[:3]
    stats = statistics(rows)
    curve = Whitened().curve(site(layer), stats)
    option = at_rank(curve, 3)
    assert option.error <= 1e-10 * curve.total
    new = Whitened().factor(layer, option, stats)
    assert output_error(layer, new, rows) <= 1e-10 * curve.total
