"""What a form reads of its children is what they compute, whatever they have become."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrize

from lowrank.errors import LowrankError
from lowrank.nn import (
    CURLinear,
    DenseSparseLinear,
    LowRankEmbedding,
    LowRankLinear,
    LowRankMaskedLinear,
    LowRankSparseLinear,
    PivotedLinear,
    SharedLowRankLinear,
    SparseDenseLinear,
    TiedHead,
    USVLinear,
)
from lowrank.nn.children import is_plain, is_sharded, linear_weight, table_weight


class Eighths(nn.Module):
    """A linear layer in int8, without a `.weight`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = float(layer.weight.detach().abs().max()) / 127
        self.register_buffer("codes", (layer.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale, self.bias)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(copy.deepcopy(layer), "weight", Doubled())


def hooked(layer: nn.Linear) -> nn.Module:
    layer = copy.deepcopy(layer)
    layer.register_forward_hook(lambda module, args, output: 3 * output)
    return layer


def patched(layer: nn.Linear) -> nn.Module:
    layer = copy.deepcopy(layer)
    old = layer.forward
    layer.forward = lambda x: -old(x)  # type: ignore[method-assign]
    return layer


BECOME: dict[str, Callable[[Any], nn.Module]] = {
    "eighths": Eighths, "doubled": doubled, "hooked": hooked, "patched": patched,
}  # fmt: skip


def shared() -> SharedLowRankLinear:
    owner = LowRankLinear(12, 5, 3, bias=False)
    return SharedLowRankLinear.from_factors(owner, torch.randn(10, 3), None)


FORMS: dict[str, Callable[[], nn.Module]] = {
    "factors": lambda: LowRankLinear(12, 10, 3, bias=False),
    "shared": shared,
    "usv": lambda: USVLinear(12, 10, 3, 3, bias=False),
    "cur": lambda: CURLinear(12, 10, 3, bias=False),
    "outputs": lambda: PivotedLinear(12, 10, 3, side="out", bias=False),
    "inputs": lambda: PivotedLinear(12, 10, 3, side="in", bias=False),
    "columns": lambda: LowRankSparseLinear(12, 10, 3, 2, bias=False),
    "entries": lambda: LowRankMaskedLinear(12, 10, 3, 7, bias=False),
    "codes": lambda: DenseSparseLinear(12, 10, 6, 2, bias=False),
    "codes of inputs": lambda: SparseDenseLinear(12, 10, 6, 2, bias=False),
    "head": lambda: TiedHead.of(LowRankEmbedding(10, 12, 3)),
}
CHILDREN = ("up", "down", "core", "mix", "basis")


def changed(form: nn.Module, how: str) -> nn.Module:
    """The form with all its linear children turned into something else."""
    holder = form.owner if isinstance(form, TiedHead) else form
    names = [name for name in CHILDREN if name in holder._modules]
    for name in names:
        setattr(holder, name, BECOME[how](holder._modules[name]))
    assert names
    return form


@pytest.mark.parametrize("how", BECOME)
@pytest.mark.parametrize("form", FORMS)
def test_weight_and_forward_agree(form: str, how: str) -> None:
    torch.manual_seed(0)
    layer = changed(FORMS[form](), how).eval()
    for tokens in (3, 600):
        x = torch.randn(tokens, 12)
        with torch.no_grad():
            dense, y = layer.dense_weight(), layer(x)
            torch.testing.assert_close(y, x @ dense.T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(y, x @ layer.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", BECOME)
def test_the_head_follows_its_embedding(how: str) -> None:
    torch.manual_seed(0)
    table = LowRankEmbedding(10, 12, 3)
    head, x = TiedHead.of(table), torch.randn(4, 12)
    with torch.no_grad():
        before = head(x)
        changed(head, how)
        rows = table(torch.arange(10))  # what the embedding says of every token
        torch.testing.assert_close(head(x), x @ rows.T, rtol=1e-4, atol=1e-5)
        assert torch.allclose(head(x), before, atol=2e-2) == (how == "eighths")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize")
def test_dynamic_int8_of_torch() -> None:
    torch.manual_seed(0)
    table = LowRankEmbedding(10, 12, 3)
    net = nn.ModuleDict({"table": table, "layer": LowRankLinear(12, 12, 4)})
    head, x = TiedHead.of(table), torch.randn(4, 12)
    with torch.no_grad():
        want = head(net["layer"](x))
        quantized = quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
        head = TiedHead.of(quantized["table"])
        got, rows = head(quantized["layer"](x)), quantized["table"](torch.arange(10))
        assert float((got - want).abs().max()) < 0.05 * float(want.abs().max())
        torch.testing.assert_close(head(x), x @ rows.T, rtol=0.02, atol=0.02)


def test_a_table_that_is_not_plain() -> None:
    table = LowRankEmbedding(10, 12, 3)
    table.rows.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(4, 12)
    with torch.no_grad():
        torch.testing.assert_close(TiedHead.of(table)(x), x @ table(torch.arange(10)).T)
    bag = LowRankEmbedding(10, 12, 3, mode="sum")
    bag.rows.register_forward_pre_hook(lambda module, args: None)
    with torch.no_grad():
        torch.testing.assert_close(TiedHead.of(bag)(x), x @ bag(torch.arange(10)[:, None]).T)
    padded = LowRankEmbedding(10, 12, 3, mode="sum", padding_idx=0)
    padded.rows.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(LowrankError, match="cannot be read as a whole"):
        TiedHead.of(padded)(x)


def test_gradients_reach_a_child_that_is_not_plain() -> None:
    table = LowRankEmbedding(10, 12, 3)
    table.up = doubled(table.up)
    TiedHead.of(table)(torch.randn(4, 12)).square().sum().backward()
    assert bool(table.rows.weight.grad.any())
    assert bool(table.up.parametrizations.weight.original.grad.any())


def test_plain_children_are_read_without_a_call() -> None:
    layer, rows = nn.Linear(4, 3), nn.Embedding(5, 2)
    assert is_plain(layer)
    assert linear_weight(layer) is layer.weight
    assert table_weight(rows, 5) is rows.weight
    assert not is_plain(hooked(layer))


def test_a_bias_is_no_part_of_the_weight() -> None:
    layer = nn.Linear(4, 3)
    torch.testing.assert_close(linear_weight(patched(layer)), -layer.weight)


class DTensor(Tensor):
    """Of the name of FSDP2's slices, which need a group of processes."""


def sharded(child: nn.Module) -> nn.Module:
    child.weight = nn.Parameter(child.weight.detach().as_subclass(DTensor))
    assert is_sharded(child.weight)
    return child


def test_slices_are_not_read_as_a_weight() -> None:
    layer = LowRankLinear(12, 5, 3)
    sharded(layer.up)
    with pytest.raises(LowrankError, match=r"no process has the dense weight: gather"):
        layer.dense_weight()
    with pytest.raises(LowrankError, match=r"load them into a model that is not sharded"):
        table_weight(sharded(nn.Embedding(5, 2)), 5)


def test_a_child_that_gathers_its_slices_is_called() -> None:
    """As a unit of FSDP of its own does, by hooks."""
    layer = nn.Linear(4, 3)
    sharded(layer).register_forward_hook(lambda module, args, output: 3 * output)
    torch.testing.assert_close(linear_weight(layer), 3 * layer.weight.as_subclass(Tensor))


def test_slices_of_another_layer_are_not_read() -> None:
    table, basis = LowRankEmbedding(10, 12, 3), shared()
    sharded(table.up)
    sharded(basis.owner.down)
    with pytest.raises(LowrankError, match="the embedding and the head tied to it share a factor"):
        TiedHead.of(table)(torch.randn(4, 12))
    with pytest.raises(LowrankError, match="fully_shard on a module that holds both"):
        basis(torch.randn(4, 12))
