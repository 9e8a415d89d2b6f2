"""What the layers share that are sized by several numbers: the arithmetic, files, other modes."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn.functional import linear

from lowrank.nn import (
    FACTORED,
    BlockLowRankLinear,
    LowRankLinear,
    LowRankMaskedLinear,
    SparseDenseLinear,
    build,
    describe,
    form_of,
    is_factored,
    remember_layout,
)
from lowrank.types import Cost, Factored

from ..draws import normal
from .forms import FORMS, check_differences

SHAPES = [(12, 9), (7, 10), (5, 11), (3, 8)]  # three blocks divide neither side of most
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(params=FORMS)
def made(request: Any) -> Any:
    return FORMS[request.param]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_and_dense_weight_are_numpys(
    made: Any, shape: tuple[int, int], bias: bool, grad: bool
) -> None:
    layer, weight, shift = made(*shape, bias=bias)
    assert isinstance(layer, Factored)
    assert is_factored(layer)
    np.testing.assert_allclose(layer.dense_weight().detach(), weight, atol=1e-12)
    for lead in ((), (4,), (2, 3), (2, 1, 5), (0,), (70, 3)):
        x = torch.randn(*lead, shape[1], dtype=torch.float64)
        want = x.numpy() @ weight.T + (0 if shift is None else shift)
        with torch.set_grad_enabled(grad):
            got = layer(x)
        assert got.shape == (*lead, shape[0])
        np.testing.assert_allclose(got.detach(), want, atol=1e-11)
        view = torch.randn(shape[1], 4, dtype=torch.float64).T  # not contiguous
        np.testing.assert_allclose(layer(view).detach(), layer(view.clone()).detach(), atol=1e-11)


def test_gradients_are_those_of_the_dense_layer(made: Any) -> None:
    layer, weight, _ = made(7, 10)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    dense = torch.from_numpy(weight).requires_grad_()
    layer(x).square().sum().backward()
    got, x.grad = x.grad, None
    linear(x, dense, layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(got, x.grad)
    through = copy.deepcopy(layer)
    for parameter in through.parameters():
        parameter.grad = None
    (through.dense_weight() * dense.grad).sum().backward()
    for name, parameter in through.named_parameters():
        if name.rpartition(".")[2] != "bias":
            torch.testing.assert_close(parameter.grad, layer.get_parameter(name).grad)


def test_gradients_agree_with_differences(made: Any) -> None:
    check_differences(made(5, 6).layer, normal(3, 6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_spec_and_file_rebuild_it_bit_for_bit(made: Any, dtype: torch.dtype) -> None:
    layer = made(7, 10).layer.to(dtype)
    remember_layout(layer, "conv1d")
    spec = json.loads(json.dumps(describe(layer)))
    again = build(spec, "here")
    assert all(tensor.is_meta for tensor in again.state_dict().values())
    again.load_state_dict(load(save(layer.state_dict())), assign=True)
    assert describe(again) == spec
    x = torch.randn(3, 10).to(dtype)
    with torch.no_grad():
        assert torch.equal(again(x), layer(x))
        assert layer(x).dtype == dtype
    indices = [t.dtype for t in again.state_dict().values() if not t.is_floating_point()]
    assert {*indices} <= {torch.uint8, torch.int32}  # what DistributedDataParallel hands on


@pytest.mark.parametrize("dtype", DTYPES)
def test_cost_is_what_is_stored(made: Any, dtype: torch.dtype) -> None:
    layer = made(7, 10).layer.to(dtype)
    tensors = {k: t for k, t in layer.state_dict().items() if k.rpartition(".")[2] != "bias"}
    params = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    macs = params  # but for zeros that are multiplied too
    if isinstance(layer, LowRankMaskedLinear):
        macs = 7 * 10 + 2 * (7 + 10)
    if isinstance(layer, SparseDenseLinear):
        macs = 3 * (7 + 10)
    assert layer.cost() == Cost(params, stored, macs)


def test_weight_reads_as_the_dense_one_and_costs_nothing_to_look_at(made: Any) -> None:
    layer, weight, _ = made(7, 10)
    assert (layer.weight.shape, layer.weight.dtype) == ((7, 10), torch.float64)
    np.testing.assert_allclose((layer.weight + 0).detach(), weight, atol=1e-12)
    assert (layer.in_features, layer.out_features) == (10, 7)


def test_other_dtypes_for_the_dense_weight(made: Any) -> None:
    layer = made(7, 10).layer.bfloat16()
    assert layer.dense_weight().dtype == torch.bfloat16
    exact = layer.dense_weight(torch.float64)
    assert exact.dtype == torch.float64
    assert torch.equal(exact, copy.deepcopy(layer).double().dense_weight())


@pytest.mark.parametrize("grad", [True, False])
def test_under_autocast_it_does_as_a_linear_layer(made: Any, grad: bool) -> None:
    layer, weight, _ = made(7, 10)
    layer = layer.float()
    x = torch.randn(4, 10)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        got = layer(x)
        assert got.dtype == nn.Linear(10, 7)(x).dtype == torch.bfloat16
    want = linear(x, torch.from_numpy(weight).float(), layer.bias)
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.3)


def test_export_and_copies_compute_the_same(made: Any) -> None:
    layer = made(7, 10).layer.float().eval()
    x = torch.randn(4, 10)
    program = torch.export.export(layer, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), layer(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_fresh_layer_computes_something(made: Any) -> None:
    """By its constructor, for training from scratch."""
    layer = made(8, 12).layer
    torch.manual_seed(0)
    fresh = type(layer)(**layer.spec())
    assert describe(fresh) == describe(layer)
    y = fresh(torch.randn(64, 12)).detach()
    assert 0.05 < float(y.std()) < 20


def test_a_size_tells_the_cost_of_the_layer(made: Any) -> None:
    layer = made(7, 10).layer
    assert type(layer) is FACTORED[type(layer).__name__] is form_of(type(layer).STORAGE)
    size = tuple(layer.spec()[name] for name in type(layer).SIZE)
    assert layer.cost() == type(layer).size_cost((7, 10), size, itemsize=8)
    assert len(size) >= 2
    assert layer.REFITTED or type(layer) is BlockLowRankLinear  # which no method makes


def test_a_unit_of_fsdp_is_the_form_that_it_was() -> None:
    """fully_shard puts a class of its own before that of the module."""
    layer = LowRankLinear(4, 3, 2)
    spec = describe(layer)
    mixin = type("FSDPModule", (), {})
    layer.__class__ = type("FSDPLowRankLinear", (mixin, LowRankLinear), {})
    assert is_factored(layer)
    assert describe(layer) == spec
    layer.__class__ = type("Mine", (LowRankLinear,), {})
    assert not is_factored(layer)


@pytest.mark.parametrize("name", [n for n, form in FACTORED.items() if form.KIND != "mlp"])
def test_it_is_called_by_the_names_of_torch(name: str) -> None:
    """`layer(input=x)` goes on to work; what is tied hands everything on."""
    _, first, *_ = inspect.signature(FACTORED[name].forward).parameters
    assert first in ("input", "args")
