"""A basis that several layers share: one tensor, one product, and never a stale one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lowrank.errors import LowrankError
from lowrank.nn import LowRankLinear, SharedLowRankLinear
from lowrank.types import Cost

WIDTH, RANK, OUTS = 8, 3, (6, 4, 5)


def group(dtype: torch.dtype = torch.float64) -> nn.ModuleList:
    """An owner and two that share its `down`."""
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    owner = LowRankLinear.from_factors(drawn(RANK, WIDTH), drawn(OUTS[0], RANK), drawn(OUTS[0]))
    second = SharedLowRankLinear.from_factors(owner, drawn(OUTS[1], RANK), drawn(OUTS[1]))
    third = SharedLowRankLinear.from_factors(owner, drawn(OUTS[2], RANK), None)
    return nn.ModuleList([owner, second, third])


def inputs(rows: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def wanted(layers: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """By plain products of what is stored, with nothing kept."""
    down = layers[0].down.weight
    return [nn.functional.linear(x @ down.T, m.up.weight, m.up.bias) for m in layers]


@contextmanager
def counted(layers: nn.ModuleList) -> Iterator[list[int]]:
    """How often the shared product is computed."""
    calls: list[int] = []
    handle = layers[0].down.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def check(layers: nn.ModuleList, x: Tensor) -> None:
    for got, want in zip([m(x) for m in layers], wanted(layers, x), strict=True):
        assert torch.equal(got, want)


def test_each_layer_is_a_product_with_the_one_down() -> None:
    layers, x = group(), inputs()
    with torch.no_grad():
        check(layers, x)
        for layer in layers:
            torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
            assert torch.equal(layer.dense_weight(), layer.up.weight @ layers[0].down.weight)
    assert [m.in_features for m in layers] == [WIDTH] * 3
    assert [m.out_features for m in layers] == list(OUTS)
    assert layers[1].owner is layers[0]
    assert layers[0].owner is None


def test_it_is_stored_once_and_counted_once() -> None:
    layers = group()
    names = ["0.down.weight", "0.up.weight", "0.up.bias", "1.up.weight", "1.up.bias", "2.up.weight"]
    assert list(layers.state_dict()) == names
    assert len(list(layers.parameters())) == len(names)
    total = layers[0].cost() + layers[1].cost() + layers[2].cost()
    numbers = RANK * (WIDTH + sum(OUTS))
    assert total == Cost(numbers, 8 * numbers, numbers)


def test_the_product_is_computed_once_per_input() -> None:
    layers = group()
    with torch.no_grad(), counted(layers) as calls:
        for turn in range(1, 4):
            check(layers, inputs() + turn)
            assert len(calls) == turn


def test_an_input_that_was_changed_in_place_is_another() -> None:
    layers, x = group(), inputs()
    with torch.no_grad(), counted(layers) as calls:
        layers[0](x)
        x[0] += 1
        assert torch.equal(layers[1](x), wanted(layers, x)[1])
        assert len(calls) == 2


def test_equal_numbers_in_another_tensor_are_another_input() -> None:
    layers, x = group(), inputs()
    with torch.no_grad(), counted(layers) as calls:
        layers[0](x)
        layers[1](x.clone())
        assert len(calls) == 2
        assert torch.equal(layers[2](x), wanted(layers, x)[2])
        assert len(calls) == 2  # the first one is still at hand


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded", "moved"])
def test_a_basis_that_was_changed_is_read_anew(change: str) -> None:
    layers, x = group(), inputs()
    with torch.no_grad():
        layers[0](x)
        down = layers[0].down
        if change == "in place":
            down.weight.mul_(2)
        elif change == "replaced":
            down.weight = nn.Parameter(down.weight * 2)
        elif change == "loaded":
            layers.load_state_dict({n: t * 2 for n, t in layers.state_dict().items()})
        else:
            layers.to(torch.float32)
            x = x.float()
        assert torch.equal(layers[1](x), wanted(layers, x)[1])


def test_any_order_of_calls_gives_the_same() -> None:
    layers, x = group(), inputs()
    with torch.no_grad():
        for order in ((1, 0, 2), (2, 1, 0), (0, 1, 1, 1, 2, 0), (1, 2)):
            for index in order:
                assert torch.equal(layers[index](x), wanted(layers, x)[index])


def test_gradients_of_all_layers_add_up_in_the_one_down() -> None:
    layers, x = group(), inputs()
    with counted(layers) as calls:
        sum(m(x).square().sum() for m in layers).backward()
        assert len(calls) == 3  # nothing is kept while a graph is recorded
    weight = layers[0].down.weight
    found, weight.grad = weight.grad, None
    sum(y.square().sum() for y in wanted(layers, x)).backward()
    torch.testing.assert_close(found, weight.grad)


def test_a_product_without_a_graph_is_not_given_to_a_graph() -> None:
    layers, x = group(), inputs()
    with torch.no_grad():
        layers[0](x)
    layers[1](x).sum().backward()
    assert layers[0].down.weight.grad.abs().sum() > 0
    frozen = group().requires_grad_(False)
    frozen[0](x)
    x.requires_grad_()
    frozen[1](x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_frozen_layers_share_with_gradients_enabled() -> None:
    layers, x = group().requires_grad_(False), inputs()
    with counted(layers) as calls:
        check(layers, x)
        assert len(calls) == 1


def test_inference_tensors_count_no_versions_and_are_not_kept() -> None:
    layers = group()
    with torch.inference_mode():
        x = inputs() + 0
        layers[0](x)
        x[0] += 1
        assert torch.equal(layers[1](x), wanted(layers, x)[1])


def test_autocast_is_part_of_what_was_computed() -> None:
    layers, x = group(torch.float32), inputs(dtype=torch.float32)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layers[0](x)
        assert torch.equal(layers[1](x), wanted(layers, x)[1])


@pytest.mark.parametrize("how", ["all read", "input gone", "next input"])
def test_nothing_is_kept_longer_than_needed(how: str) -> None:
    layers, x = group(), inputs()
    products: list[weakref.ref[Tensor]] = []
    layers[0].down.register_forward_hook(lambda _m, _i, out: products.append(weakref.ref(out)))
    seen = weakref.ref(x)
    with torch.no_grad():
        layers[0](x)
        gc.collect()
        assert products[0]() is not None
        if how == "all read":
            layers[1](x)
            assert products[0]() is not None
            layers[2](x)
        elif how == "input gone":
            del x
            assert seen() is None
        else:
            layers[0](inputs(2))
        assert products[0]() is None


def test_a_copy_and_a_pickle_are_bound_to_themselves_and_hold_no_product() -> None:
    layers, x = group(), inputs(400)
    with torch.no_grad():
        layers[0](x)
        for twin in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
            assert twin[1].owner is twin[0] is not layers[0]
            assert len(pickle.dumps(twin)) < 400 * RANK * 8
            twin[0].down.weight.mul_(2)
            with counted(twin) as calls:
                check(twin, x)
                assert len(calls) == 1
        check(layers, x)


def test_casts_reach_the_one_down() -> None:
    layers = group().to(torch.bfloat16)
    assert {p.dtype for p in layers.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        check(layers, inputs(dtype=torch.bfloat16))


class Reads(nn.Module):
    """All layers on one input, with a product kept from before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = group(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


@pytest.mark.parametrize("strict", [False, True])
def test_it_can_be_exported(strict: bool) -> None:
    model, x = Reads().eval(), inputs(dtype=torch.float32)
    with torch.no_grad():
        model.layers[0](x)
        exported = torch.export.export(model, (x,), strict=strict)
        assert sum("down" in name for name in exported.state_dict) == 1
        other = x + 1
        torch.testing.assert_close(exported.module()(other), model(other))


def test_it_can_be_compiled_and_traced() -> None:
    model, x = Reads().eval(), inputs(dtype=torch.float32)
    with torch.no_grad():
        model.layers[0](x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        traced = torch.jit.trace(model, (x,), check_trace=False)
        for each in (compiled, traced):
            torch.testing.assert_close(each(x + 1), model(x + 1))


def test_binding_checks_what_it_is_given() -> None:
    layers = group()
    empty = SharedLowRankLinear.empty(in_features=WIDTH, out_features=2, rank=RANK, bias=False)
    with pytest.raises(LowrankError, match="was never bound to the owner"):
        empty(inputs())
    for wrong in (layers[1], nn.Linear(WIDTH, RANK), LowRankLinear(WIDTH, 4, RANK + 1)):
        with pytest.raises(LowrankError, match=r"of \(in, rank\) \(8, 3\) cannot share"):
            empty.bind(wrong)
    other = group()
    layers[1].bind(other[0])
    with torch.no_grad():
        x = inputs()
        other[0].down.weight.mul_(2)
        layers[0](x)
        want = nn.functional.linear(x @ other[0].down.weight.T, *layers[1].up.parameters())
        assert torch.equal(layers[1](x), want)
        with counted(layers) as calls:
            layers[0](x)
            layers[2](x)
            assert len(calls) == 1
            assert layers[0]._last._kept is None  # the one that left is not waited for
