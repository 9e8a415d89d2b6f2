"""Recurrent nets from layers against torch's own."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lowrank.nn.splits import split_module

CELLS: dict[str, Any] = {
    "LSTM": nn.LSTM,
    "LSTM with proj_size": lambda *a, **k: nn.LSTM(*a, proj_size=3, **k),
    "GRU": nn.GRU,
    "RNN": nn.RNN,
    "RNN of ReLUs": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data, value.batch_sizes]
    return [tensor for part in value for tensor in _flat(part)]


def _equal(found: Any, expected: Any) -> None:
    for one, other in zip(_flat(found), _flat(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def _state(whole: nn.RNNBase) -> Any:
    lanes = whole.num_layers * (1 + whole.bidirectional)
    hidden = torch.randn(lanes, 3, whole.proj_size or whole.hidden_size)
    return (hidden, torch.randn(lanes, 3, 6)) if whole.mode == "LSTM" else hidden


def _first(state: Any) -> Any:
    return tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both_ways", [False, True])
def test_equals_torch(cell: str, layers: int, both_ways: bool) -> None:
    for bias, first in itertools.product((False, True), repeat=2):
        torch.manual_seed(0)
        options = {"bidirectional": both_ways, "bias": bias, "batch_first": first}
        whole = CELLS[cell](4, 6, num_layers=layers, **options)
        split = copy.deepcopy(whole)
        split_module(split)
        steps = torch.randn(5, 3, 4)
        x = steps.transpose(0, 1) if first else steps
        packed = pack_padded_sequence(steps, torch.tensor([2, 5, 3]), enforce_sorted=False)
        state = _state(whole)
        _equal(split(x), whole(x))
        _equal(split(x, state), whole(x, state))
        _equal(split(packed), whole(packed))
        _equal(split(packed, state), whole(packed, state))
        _equal(split(steps[:, 0]), whole(steps[:, 0]))
        _equal(split(steps[:, 0], _first(state)), whole(steps[:, 0], _first(state)))


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_gradients_equal_those_of_torch(cell: str) -> None:
    torch.manual_seed(0)
    whole = CELLS[cell](4, 6)
    split = copy.deepcopy(whole)
    split_module(split)
    split.flatten_parameters()  # models call it; there is nothing to flatten
    x = torch.randn(5, 3, 4)
    for module in (whole, split):
        module(x)[0].square().sum().backward()
    for name in ("ih_l0", "hh_l0"):
        layer = split._modules[name]
        torch.testing.assert_close(layer.weight.grad, getattr(whole, f"weight_{name}").grad)
        torch.testing.assert_close(layer.bias.grad, getattr(whole, f"bias_{name}").grad)


def test_dropout_between_layers_in_training_only() -> None:
    torch.manual_seed(0)
    whole = nn.LSTM(4, 6, num_layers=2, dropout=0.5)
    split_module(whole)
    x = torch.randn(5, 3, 4)
    assert not torch.equal(whole(x)[0], whole(x)[0])
    whole.eval()
    assert torch.equal(whole(x)[0], whole(x)[0])


def test_sizes_that_do_not_fit_are_refused() -> None:
    net: Any = nn.GRU(4, 6)
    split_module(net)
    with pytest.raises(RuntimeError, match=r"expected \(…, 4\)"):
        net(torch.randn(5, 3, 5))
    with pytest.raises(RuntimeError, match="expected a state of shape"):
        net(torch.randn(5, 3, 4), torch.randn(1, 2, 6))


def test_whole_again_its_lists_of_parameters_follow() -> None:
    from lowrank.nn.unfused import fuse

    net: Any = nn.LSTM(4, 6)
    x = torch.randn(5, 3, 4)
    expected = net(x)
    fuse(net, split_module(net))
    _equal(net(x), expected)
    net.double()  # moves the lists too
    _equal(net(x.double())[0].float(), expected[0])
