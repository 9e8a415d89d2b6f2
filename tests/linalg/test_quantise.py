"""Rounding with carried errors, against the conditional optimum by dense least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank.linalg import (
    carried_codes,
    carrier,
    decoded,
    expected_error,
    group_scales,
    in_metric,
    nearest,
    output_root,
    spread_scales,
    zero_of,
)

BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(side: int, seed: int) -> Tensor:
    """Of correlated rows, positive definite; its diagonal rises, so that no order is changed."""
    rows = normal(4 * side, side, seed=seed) @ (normal(side, side, seed=seed + 1) / side**0.5 + 1)
    gram = rows.T @ rows / len(rows)
    order = gram.diagonal().argsort()
    return gram[order][:, order]


def by_least_squares(weight: np.ndarray, step: np.ndarray, metric: np.ndarray, bits: int) -> Tensor:
    """Number by number from the last: the nearest code to what is best there, were all numbers
    that are still to come real."""
    flat, steps = weight.ravel(), step.ravel()
    codes, errors = np.zeros_like(flat), np.zeros_like(flat)
    zero = float(zero_of(bits))
    for place in reversed(range(flat.size)):
        free, done = slice(0, place + 1), slice(place + 1, None)
        best = -np.linalg.solve(metric[free, free], metric[free, done] @ errors[done])
        wanted = flat[place] - best[place]
        codes[place] = np.clip(np.round(wanted / steps[place] + zero), 0, 2**bits - 1)
        errors[place] = flat[place] - steps[place] * (codes[place] - zero)
    return torch.from_numpy(codes.reshape(weight.shape))


@pytest.mark.parametrize("sides", ["inputs", "both"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_number_is_the_best_given_those_before_it(sides: str, bits: int) -> None:
    weight, gram, out_gram = normal(5, 7), gram_of(7, 3), gram_of(5, 9)
    root = output_root(out_gram) if sides == "both" else None
    step = spread_scales(group_scales(weight, bits, 4, gram.diagonal(), BF16), 4, 7)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    outer = torch.eye(5, dtype=torch.float64) if root is None else root.T @ root
    metric = torch.kron(outer, damped).numpy()
    want = by_least_squares(weight.numpy(), step.numpy(), metric, bits)
    got = carried_codes(weight, step, bits, carrier(gram, root))
    assert got.dtype == torch.uint8
    assert torch.equal(got.double(), want)
    assert not torch.equal(got.double(), nearest(weight, step, bits))


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (64, 32)])
def test_tiles_and_orders_change_nothing(shape: tuple[int, int]) -> None:
    """Of more than one tile, inputs and outputs in any order; rows alone, if outputs are apart."""
    out, inner = shape
    weight, gram = normal(*shape), gram_of(inner, 3)
    apart = torch.eye(out, dtype=torch.float64)
    step = spread_scales(group_scales(weight, 3, 16, gram.diagonal(), BF16), 16, inner)
    alone = carried_codes(weight, step, 3, carrier(gram))
    assert torch.equal(carried_codes(weight, step, 3, carrier(gram, apart)), alone)
    root, order = output_root(gram_of(out, 5)), torch.randperm(inner)
    codes = carried_codes(weight, step, 3, carrier(gram, root))
    turned = carrier(gram[order][:, order], root)
    assert torch.equal(carried_codes(weight[:, order], step[:, order], 3, turned), codes[:, order])


def test_carrying_on_lowers_the_error_and_its_estimate_is_near() -> None:
    weight, gram, root = normal(48, 64), gram_of(64, 3), output_root(gram_of(48, 5))
    found = {}
    for bits in (3, 4):
        step = spread_scales(group_scales(weight, bits, 64, gram.diagonal(), BF16), 64, 64)
        carry = carrier(gram, root)
        ways = {
            "nearest": nearest(weight, step, bits),
            "inputs": carried_codes(weight, step, bits, carrier(gram)),
            "both": carried_codes(weight, step, bits, carry),
        }
        for name, codes in ways.items():
            left = weight - decoded(codes.double(), step, bits)
            found[name] = float(in_metric(left, carry).square().sum())
        assert 0.7 * found["nearest"] > found["inputs"] > 1.1 * found["both"]
        estimate = float(expected_error(weight, step, bits, carry).square().sum())
        assert 0.7 * found["both"] < estimate < 1.3 * found["both"]


def test_the_metric_is_that_of_both_sides() -> None:
    error, gram, root = normal(6, 9), gram_of(9, 3), output_root(gram_of(6, 5))
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    turned = root @ error
    want = float(torch.trace(turned @ damped @ turned.T))
    assert float(in_metric(error, carrier(gram, root)).square().sum()) == pytest.approx(want)
    alone = float(torch.trace(error @ damped @ error.T))
    assert float(in_metric(error, carrier(gram)).square().sum()) == pytest.approx(alone)


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_on_a_grid_are_kept(bits: int) -> None:
    codes = torch.randint(2**bits, (6, 10), generator=torch.Generator().manual_seed(0)).double()
    codes[:, 0] = 0  # the end that is furthest from zero
    weight = decoded(codes, torch.tensor([[0.25], [-1], [2], [8], [-0.5], [1]]).double(), bits)
    scale = group_scales(weight, bits, 10, torch.ones(10), BF16)
    found = nearest(weight, scale, bits)
    assert 0 <= found.min() <= found.max() <= 2**bits - 1
    torch.testing.assert_close(decoded(found, scale, bits), weight)


def test_scales_are_what_the_dtype_holds_and_zero_where_there_is_nothing() -> None:
    weight = normal(3, 10)
    weight[1, 4:8] = 0
    scale = group_scales(weight, 4, 4, torch.ones(10), BF16)
    assert scale.shape == (3, 3)  # the last group is short
    assert torch.equal(scale, scale.to(BF16).double())
    assert float(scale[1, 1]) == 0
    assert int((scale == 0).sum()) == 1
    step = spread_scales(scale, 4, 10)
    codes = carried_codes(weight, step, 4, carrier(torch.zeros(10, 10)))
    assert torch.equal(codes.double(), nearest(weight, step, 4))  # nothing is carried
    assert bool((decoded(codes.double(), step, 4)[1, 4:8] == 0).all())


def test_important_inputs_choose_the_scale() -> None:
    """At few bits a smaller scale serves those in the middle, at the cost of the outlier."""
    weight = torch.cat([normal(1, 31) / 10, torch.ones(1, 1).double()], 1)
    flat, pointed = torch.ones(32), torch.ones(32)
    pointed[-1] = 1e6
    assert group_scales(weight, 2, 32, flat, BF16) < group_scales(weight, 2, 32, pointed, BF16)
