"""A layer's `.weight`: right wherever it is computed with, free where it is only looked at, and
an error where it is written to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lowrank.errors import LowrankError
from lowrank.nn import (
    ChannelConv,
    LowRankEmbedding,
    LowRankLinear,
    SharedLowRankLinear,
    TiedEmbedding,
    TiedHead,
    USVLinear,
)
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


def wrote(weight: Any, how: str) -> None:
    """Write to it, one way or another, as if it were a parameter."""
    with torch.no_grad():
        exec(how, {"w": weight, "torch": torch, "F": functional, "init": nn.init})


WRITES = (
    "w.data += 1", "w.data = torch.zeros(4, 5)", "w.data.copy_(torch.zeros(4, 5))",
    "w.data[0] = 0", "w += 1", "w *= 2", "w[0] = 0", "w[0, 1:] += 1", "w.copy_(torch.zeros(4, 5))",
    "w.zero_()", "w.detach().zero_()", "w.T.add_(1)", "w.view(-1).fill_(0)", "w[0].zero_()",
    "w.chunk(2)[0].zero_()", "init.zeros_(w)", "init.normal_(w)", "init.orthogonal_(w)",
    "init.xavier_uniform_(w)", "init.normal_(tensor=w)", "F.relu(w, inplace=True)",
    "torch.relu_(w)", "torch.mul(w, 2, out=w)", "torch._foreach_add_([w], 1)",
    "w.requires_grad_(False)", "w.requires_grad = False", "w.grad = None",
    "w.register_hook(print)", "w.set_(torch.zeros(4, 5))",
)  # fmt: skip


@pytest.mark.parametrize("how", WRITES)
def test_a_write_is_an_error_that_says_what_to_do(layer: LowRankLinear, how: str) -> None:
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(LowrankError, match=r"would be lost\. Change the factors instead"):
        wrote(layer.weight, how)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    wrote(torch.ones(4, 5, requires_grad=True), how)  # a parameter takes it


def test_reading_it_is_no_write(layer: LowRankLinear) -> None:
    dense = product(layer).detach()
    with torch.no_grad():
        assert torch.equal(torch.zeros(4, 5).add_(layer.weight), dense)
        out = torch.empty(4, 5)
        torch.mul(layer.weight, 2, out=out)
        assert torch.equal(out, 2 * dense)
        assert torch.equal(layer.weight.clone().mul_(2), 2 * dense)
        assert torch.equal(layer.weight.detach().cpu().view(-1)[3:7], dense.view(-1)[3:7])
        assert torch.equal(layer.weight.data.float().T.contiguous(), dense.T)
        assert layer.weight.detach().numpy()[1, 2] == dense[1, 2]
        assert layer.weight.tolist() == dense.tolist()
        assert torch.equal(nn.Parameter(layer.weight.detach().clone()), dense)


def test_every_weight_that_is_a_product_refuses_writes() -> None:
    torch.manual_seed(0)
    table = LowRankEmbedding(7, 6, 2)
    conv = ChannelConv.from_factors(nn.Conv2d(3, 4, 3), torch.randn(2, 27), torch.randn(4, 2))
    owner = LowRankLinear(6, 5, 2)
    reader = SharedLowRankLinear.from_factors(owner, torch.randn(3, 2), None)
    found = [
        table,
        TiedHead.of(table),
        TiedEmbedding.of(table),
        conv,
        reader,
        USVLinear(6, 5, 2, 2),
    ]
    for module in found:
        dense = module.dense_weight().view(module.weight.shape)
        assert torch.equal(module.weight + 0, dense), type(module)
        with pytest.raises(LowrankError, match="would be lost"):
            module.weight.data += 1


def test_its_address_tells_what_is_tied() -> None:
    table, other = LowRankEmbedding(7, 6, 2), LowRankEmbedding(7, 6, 2)
    assert TiedHead.of(table).weight.data_ptr() == table.weight.data_ptr()
    assert other.weight.data_ptr() != table.weight.data_ptr()
