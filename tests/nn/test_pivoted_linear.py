"""The pivoted layer on both sides: the arithmetic, the names, the order, where it has to work."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowrank.errors import LowrankError
from lowrank.nn import LowRankLinear, PivotedLinear, build, describe, pivot_layer, pivot_side
from lowrank.nn.pivoted_linear import pivoted_cost
from lowrank.types import Cost

from .forms import factors

SIDES = ("out", "in")
SHAPES = [(3, 7, 2), (7, 3, 2), (6, 6, 5), (5, 4, 1)]  # (out, in, rank)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def layer(
    out_features: int, in_features: int, rank: int, *, side: Any, bias: bool = True
) -> tuple[PivotedLinear, Tensor, Tensor | None]:
    """A float64 layer, the weight that it stands for, and its bias."""
    down, up, shift = factors(out_features, in_features, rank, bias=bias)
    return PivotedLinear.from_factors(down, up, shift, side=side), up @ down, shift


@pytest.mark.parametrize(
    ("side", "shapes"),
    [
        ("out", {"order": (5,), "bias": (5,), "down.weight": (3, 8), "mix.weight": (2, 3)}),
        ("in", {"order": (8,), "bias": (5,), "up.weight": (5, 3), "mix.weight": (3, 5)}),
    ],
)
def test_names_and_shapes_of_the_tensors_are_a_contract(side: str, shapes: object) -> None:
    module, *_ = layer(5, 8, 3, side=side)
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == shapes
    assert {type(child) for child in module.children()} == {nn.Linear}
    assert module.order.dtype == torch.int32
    assert sorted(module.order.tolist()) == list(range(len(module.order)))
    assert (module.in_features, module.out_features, module.rank) == (8, 5, 3)
    assert dict(module.named_parameters())["bias"] is module.bias
    assert layer(5, 8, 3, side=side, bias=False)[0].bias is None


def test_the_order_maps_outputs_to_the_row_and_the_row_to_inputs() -> None:
    """By hand: kept 10 and 20, mixed 30 = 1·10 + 1·20, in the order (20, 30, 10)."""
    out = PivotedLinear(1, 3, 2, side="out", bias=False)
    out.load_state_dict(
        {
            "down.weight": torch.tensor([[10.0], [20.0]]),
            "mix.weight": torch.tensor([[1.0, 1.0]]),
            "order": torch.tensor([1, 2, 0], dtype=torch.int32),
        }
    )
    assert out(torch.ones(1)).tolist() == [20, 30, 10]
    assert out.dense_weight().T.tolist() == [[20, 30, 10]]
    into = PivotedLinear(3, 1, 2, side="in", bias=False)
    into.load_state_dict(
        {
            "up.weight": torch.tensor([[10.0, 20.0]]),
            "mix.weight": torch.tensor([[1.0], [1.0]]),
            "order": torch.tensor([1, 2, 0], dtype=torch.int32),
        }
    )
    assert into(torch.eye(3)).T.tolist() == [[30, 10, 20]]
    assert into.dense_weight().tolist() == [[30, 10, 20]]


@pytest.mark.parametrize("side", SIDES)
def test_weight_reads_as_the_dense_one_and_costs_nothing_to_look_at(side: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module, weight, _ = layer(5, 8, 3, side=side)
    with FlopCounterMode(display=False) as counter:
        assert (module.weight.shape, module.weight.dtype) == ((5, 8), torch.float64)
        assert module.weight.device == module.order.device
    assert counter.get_total_flops() == 0
    torch.testing.assert_close(module.weight, weight)
    x = torch.randn(2, 8, dtype=torch.float64)
    linear(x, module.weight, module.bias).sum().backward()
    assert module.mix.weight.grad is not None


@pytest.mark.parametrize("side", SIDES)
def test_gradients_are_those_of_the_dense_layer(side: str) -> None:
    """The chain rule by hand: with G = ∂/∂W, kept and mix get their share of it."""
    module, weight, _ = layer(6, 7, 3, side=side)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    dense = weight.clone().requires_grad_()
    module(x).square().sum().backward()
    got, x.grad = x.grad, None
    linear(x, dense, module.bias.detach()).square().sum().backward()
    torch.testing.assert_close(got, x.grad)
    mix, order, gradient = module.mix.weight.detach(), module.order.long(), dense.grad
    if side == "out":
        kept, mixed = gradient[order.argsort()].split((3, 3))
        torch.testing.assert_close(module.down.weight.grad, kept + mix.T @ mixed)
        torch.testing.assert_close(module.mix.weight.grad, mixed @ module.down.weight.detach().T)
    else:
        kept, mixed = gradient[:, order].split((3, 4), 1)
        torch.testing.assert_close(module.up.weight.grad, kept + mixed @ mix.T)
        torch.testing.assert_close(module.mix.weight.grad, module.up.weight.detach().T @ mixed)
    assert bool(module.bias.grad.any())


@pytest.mark.parametrize("side", SIDES)
def test_it_is_made_of_what_its_cost_says(side: str) -> None:
    for out_features, in_features, rank in SHAPES:
        module = layer(out_features, in_features, rank, side=side)[0].half()
        numbers = rank * (out_features + in_features - rank)
        ordered = out_features if side == "out" else in_features
        assert module.cost() == Cost(numbers, 2 * numbers + 4 * ordered, numbers)
        assert sum(p.numel() for n, p in module.named_parameters() if n != "bias") == numbers
    assert pivoted_cost(4, 9, 2, itemsize=2) == Cost(22, 44 + 16, 22)  # the shorter side's order
    assert pivoted_cost(9, 4, 2, itemsize=2) == Cost(22, 44 + 16, 22)


def test_the_shorter_side_is_gathered() -> None:
    assert [pivot_side(*shape) for shape in ((4, 9), (9, 4), (5, 5))] == ["out", "in", "out"]
    down, up = torch.randn(2, 4), torch.randn(9, 2)
    assert PivotedLinear.from_factors(down, up, None).side == "in"
    assert PivotedLinear.from_factors(up.T, down.T, None).side == "out"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
def test_factors_are_rounded_once_to_the_layer_s_dtype(side: Any, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    down = torch.randn(20, 48, generator=rng, dtype=torch.float64)
    up = torch.randn(40, 20, generator=rng, dtype=torch.float64)
    module = PivotedLinear.from_factors(down, up, up[:, 0].float(), side=side, dtype=dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module.order.dtype == torch.int32
    weight, error = up @ down, (module.dense_weight(torch.float64) - up @ down).norm()
    assert error <= max(1.5 * torch.finfo(dtype).eps, 1e-14) * weight.norm()
    state = copy.deepcopy(module).half().state_dict()
    assert torch.equal(state["order"], module.order)
    assert state["order"].dtype == torch.int32
    assert module.dense_weight().dtype == dtype


@pytest.mark.parametrize("side", SIDES)
def test_a_copy_a_pickle_and_a_spec_are_the_same_layer(side: str) -> None:
    module, *_ = layer(5, 8, 3, side=side)
    x = torch.randn(3, 8, dtype=torch.float64)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(x), module(x))
        assert again.order.data_ptr() != module.order.data_ptr()
    built = build(json.loads(json.dumps(describe(module))), "here")
    assert isinstance(built, PivotedLinear)
    assert all(tensor.is_meta for tensor in built.state_dict().values())
    assert {n: t.shape for n, t in built.state_dict().items()} == {
        n: t.shape for n, t in module.state_dict().items()
    }
    built.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(built(x), module(x))
    assert describe(built) == describe(module)


def test_a_spec_that_does_not_fit_is_named() -> None:
    spec = describe(layer(5, 8, 3, side="in")[0])
    for change, said in (
        ({"side": "up"}, "unknown side 'up'"),
        ({"side": 1}, "here: sizes must be integers"),
        ({"rank": 8}, r"rank must be in \[1, 7\] to pivot the 8 inputs"),
        ({"rank": 0}, r"rank must be in \[1, 7\]"),
        ({"side": "out", "rank": 5}, r"rank must be in \[1, 4\] to pivot the 5 outputs"),
    ):
        with pytest.raises(LowrankError, match=said):
            build({**spec, **change}, "here")


@pytest.mark.parametrize("side", SIDES)
def test_autocast_gives_what_a_linear_layer_gives(side: str) -> None:
    module = layer(6, 7, 3, side=side)[0].float()
    x = torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), module(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("side", SIDES)
def test_compile_and_export_trace_it_whole(side: str) -> None:
    module, *_ = layer(6, 7, 3, side=side)
    x = torch.randn(4, 7, dtype=torch.float64)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},))
    torch.testing.assert_close(program.module()(x[:3]), module(x[:3]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter, about its own innards
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx_keeps_the_order_as_an_index(tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    for side in SIDES:
        module = layer(6, 7, 3, side=side)[0].float().eval()
        x, path = torch.randn(4, 7), tmp_path / f"{side}.onnx"
        torch.onnx.export(module, (x,), path, dynamo=True)
        session = runtime.InferenceSession(str(path))
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(got, module(x).detach(), rtol=1e-5, atol=1e-5)


def test_plain_factors_become_the_same_map() -> None:
    torch.manual_seed(0)
    for shape in ((5, 8, 3), (8, 5, 3)):
        plain = LowRankLinear(shape[1], shape[0], shape[2]).eval()
        before = copy.deepcopy(plain.state_dict())
        made = pivot_layer(plain)
        assert not made.training
        assert made.side == pivot_side(*shape[:2])
        torch.testing.assert_close(made.dense_weight(), plain.dense_weight())
        assert torch.equal(made.bias, plain.bias)
        assert made.bias is not plain.bias
        assert all(torch.equal(before[name], t) for name, t in plain.state_dict().items())
    with pytest.raises(LowrankError, match="to pivot the 4 outputs"):
        pivot_layer(LowRankLinear(4, 4, 4))
