"""A layer's `.weight`: right wherever it is computed with, and free where it is only looked at."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lowrank.nn import LowRankLinear
from lowrank.nn.lazy import LazyProduct


@pytest.fixture
def layer() -> LowRankLinear:
    torch.manual_seed(0)
    return LowRankLinear(5, 4, 2)


def product(layer: LowRankLinear) -> Tensor:
    return layer.up.weight @ layer.down.weight


def test_looking_costs_nothing(layer: LowRankLinear) -> None:
    with FlopCounterMode(display=False) as counter:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        assert weight.dtype == torch.float32
        assert weight.shape == (4, 5)
        assert weight.ndim == 2
        assert weight.device == torch.device("cpu")
    assert counter.get_total_flops() == 0
    with FlopCounterMode(display=False) as counter:
        _ = layer.weight + 0
    assert counter.get_total_flops() == 2 * 4 * 2 * 5


def test_computing_gives_the_product(layer: LowRankLinear) -> None:
    dense, x = product(layer), torch.randn(3, 5)
    assert torch.equal(layer.weight + 0, dense)
    assert torch.equal(layer.weight.T, dense.T)
    assert torch.equal(layer.weight.detach(), dense)
    assert torch.equal(layer.weight.to(torch.float64), dense.double())
    assert torch.equal(torch.cat([layer.weight, dense]), torch.cat([dense, dense]))
    assert torch.equal(functional.linear(x, weight=layer.weight), functional.linear(x, dense))
    assert not isinstance(layer.weight + 0, LazyProduct)
    assert layer.weight.requires_grad


def test_gradients_reach_both_factors(layer: LowRankLinear) -> None:
    functional.linear(torch.randn(3, 5), layer.weight).sum().backward()
    assert layer.up.weight.grad is not None
    assert layer.down.weight.grad is not None
    assert bool(layer.down.weight.grad.any())


def test_it_is_stored_nowhere(layer: LowRankLinear) -> None:
    _ = layer.weight
    assert set(layer.state_dict()) == {"down.weight", "up.weight", "up.bias"}
    assert torch.equal(product(copy.deepcopy(layer)), product(layer))


def test_the_fast_path_of_torch_runs_through_the_factors() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    factored = LowRankLinear(8, 16, 3)
    dense = nn.Linear(8, 16)
    with torch.no_grad():
        dense.weight.copy_(product(factored))
        dense.bias.copy_(factored.up.bias)
        x = torch.randn(2, 4, 8)
        block.linear1 = dense
        expected = block(x)
        block.linear1 = factored
        torch.testing.assert_close(block(x), expected)
