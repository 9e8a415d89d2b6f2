"""Curves of plain factors, ranks that exist, and layers in the dtype of what they replace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.errors import LowrankError
from lowrank.methods import FWSVD, SVD, TwoSided, Whitened
from lowrank.methods.common import gram_of, low_rank_curve, low_rank_layer, rank_of
from lowrank.types import Cost, Method, Option, Statistics

from .layers import at_rank, inputs, linear, ranks, site, statistics, two_sides


def curve(out_features: int, in_features: int, errors: list[float], dtype=torch.float32):
    layer = nn.Linear(in_features, out_features, dtype=dtype)
    return low_rank_curve(site(layer), "m", errors, spectrum=None, norm="weight", exact=False)


@pytest.mark.parametrize(
    ("shape", "break_even"),
    [((768, 768), 384), ((768, 3072), 614), ((64, 64), 32), ((11008, 4096), 2985)],
)
def test_ranks_end_before_break_even(shape: tuple[int, int], break_even: int) -> None:
    """Greenformer's r_max (methods/core.md §4f); at r_max itself a square weight saves nothing."""
    with torch.device("meta"):
        layer = nn.Linear(shape[1], shape[0])
    falling = [float(k) for k in range(min(shape), -1, -1)]
    found = low_rank_curve(site(layer), "m", falling, spectrum=None, norm="weight", exact=False)
    last = max(r for r in range(1, break_even + 1) if r * sum(shape) < shape[0] * shape[1])
    assert ranks(found.options) == list(range(1, last + 1))
    assert break_even - last in (0, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_options_are_counted(dtype: torch.dtype) -> None:
    found = curve(6, 10, [6.0, 5, 4, 3, 2, 1, 0], dtype)
    first, last = found.options[0], found.options[-1]
    assert first == Option("m", (1,), "factors", Cost(16, 16 * dtype.itemsize, 16), 5.0)
    assert last == Option("dense", None, "dense", Cost(60, 60 * dtype.itemsize, 60), 0.0)
    assert found.total == 6.0
    assert ranks(found.options) == [1, 2, 3]


def test_ties_are_left_out() -> None:
    found = curve(20, 20, [9.0, 4, 4, 4, 1, 1, 0, 0, 0, 0, 0])
    assert ranks(found.options) == [1, 4, 6]


def test_a_weight_that_no_rank_makes_smaller_has_only_itself() -> None:
    for shape in ((1, 9), (9, 1), (2, 2), (1, 1)):
        assert [option.dense for option in curve(*shape, [1.0, 0.5, 0]).options] == [True]


@pytest.mark.parametrize("size", [None, (), (0,), (-1,), (4,), (2, 2)])
def test_a_size_that_is_no_rank_of_the_weight_is_refused(size: tuple[int, ...] | None) -> None:
    option = Option("svd", size, "factors", Cost(1, 1, 1), 0.0)
    with pytest.raises(LowrankError, match=r"in \[1, 3\] for shape \(3, 5\), got"):
        rank_of(option, linear(3, 5))


def test_ranks_up_to_the_smaller_side_exist() -> None:
    for rank in (1, 3):
        assert rank_of(Option("svd", (rank,), "f", Cost(1, 1, 1), 0.0), linear(3, 5)) == rank


def test_a_gram_that_is_not_there_or_of_another_width_is_refused() -> None:
    good = torch.eye(4)
    assert gram_of(Statistics(3, good), 4) is good
    with pytest.raises(LowrankError, match="width 4, got none: calibrate"):
        gram_of(Statistics(), 4)
    with pytest.raises(LowrankError, match=r"width 5, got \(4, 4\)"):
        gram_of(Statistics(3, good), 5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_takes_dtype_and_bias_of_what_it_replaces(bias: bool) -> None:
    old = nn.Linear(5, 3, bias=bias, dtype=torch.bfloat16)
    option = Option("svd", (2,), "factors", Cost(16, 64, 16), 0.0)
    new = low_rank_layer(old, torch.ones(2, 5).double(), torch.ones(3, 2).double(), option)
    assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}
    assert (new.bias is None) == (not bias)
    if bias:
        assert torch.equal(new.bias, old.bias)
        assert new.bias.data_ptr() != old.bias.data_ptr()


SHAPES = [(12, 20), (20, 12), (16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("method", "scaled", "far"),
    [
        (Whitened(), lambda shape, scale: statistics(inputs(shape[1]) * scale), 1e6),
        (TwoSided(), lambda shape, scale: two_sides(shape, scale=scale), 1e8),
    ],
)
def test_the_scale_of_inputs_and_of_gradients_does_not_matter(
    method: Method, scaled: Any, far: float, shape: tuple[int, int]
) -> None:
    layer, weights = linear(*shape), []
    for scale in (1 / far, 1, far):
        stats = scaled(shape, scale)
        option = at_rank(method.curve(site(layer), stats), 3)
        weights.append(method.factor(layer, option, stats).dense_weight())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-9, rtol=0)
    torch.testing.assert_close(weights[2], weights[1], atol=1e-9, rtol=0)


FISHER = r"got none: add it by lowrank\.with_fisher"


@pytest.mark.parametrize(
    ("method", "stats", "said"),
    [
        (Whitened(), Statistics(), "gram of an input of width 9, got none"),
        (Whitened(), Statistics(1, torch.eye(6)), r"got \(6, 6\)"),
        (TwoSided(), replace(two_sides((6, 9)), out_gram=None), f"gram of 6 outputs, {FISHER}"),
        (
            TwoSided(),
            replace(two_sides((6, 9)), out_gram=torch.eye(9)),
            r"gram of 6 outputs, got \(9, 9\)",
        ),
        (FWSVD(), Statistics(), f"of 6 rows, {FISHER}"),
        (FWSVD(), Statistics(1, row_fisher=torch.ones(9)), "of 6 rows, got 9"),
    ],
)
def test_without_its_statistics_a_method_refuses(
    method: Method, stats: Statistics, said: str
) -> None:
    layer = linear(6, 9)
    option = at_rank(SVD().curve(site(layer), Statistics()), 2)
    with pytest.raises(LowrankError, match=said):
        method.curve(site(layer), stats)
    with pytest.raises(LowrankError, match=said):
        method.factor(layer, option, stats)
