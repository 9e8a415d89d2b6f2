"""Padded ranks change nothing but the shapes of products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lowrank
from lowrank.nn import CURLinear, LowRankLinear, PivotedLinear, SharedLowRankLinear, USVLinear
from lowrank.nn.few_shapes import even, even_ranks


class Products(TorchFunctionMode):
    """A context that notes the shapes of the weights in `F.linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self.shapes.add(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def factors(rank: int, bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(rank)
    return torch.randn(rank, 48), torch.randn(64, rank), torch.randn(64) if bias else None


def layer_of(form: str, rank: int, bias: bool) -> Any:
    if form == "factors":
        return LowRankLinear.from_factors(*factors(rank, bias)).bfloat16()
    if form == "usv":
        down, up, shift = factors(rank, bias)
        return USVLinear.from_factors(up, torch.randn(rank, rank), down.T, shift).bfloat16()
    if form == "cur":
        down, up, shift = factors(rank, bias)
        return CURLinear.from_parts(up, torch.randn(rank, rank), down, shift).bfloat16()
    side: Any = form
    return PivotedLinear.from_factors(*factors(rank, bias), side=side, dtype=torch.bfloat16)


def test_sizes_are_few_and_near() -> None:
    assert all(size <= even(size) <= size * 5 / 4 + 16 for size in range(1, 5000))
    assert len({even(size) for size in range(1, 4097)}) < 30
    assert [even(size) for size in (1, 16, 17, 129, 256)] == [16, 16, 32, 160, 256]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["factors", "usv", "cur", "in", "out"])
def test_outputs_and_gradients_stay(form: str, bias: bool) -> None:
    layer = layer_of(form, 21, bias)
    x = torch.randn(2, 3, 48).bfloat16()
    expected = layer(x)
    expected.float().square().sum().backward()
    slopes = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    with even_ranks(layer), Products() as products:
        found = layer(x)
    found.float().square().sum().backward()
    assert products.shapes
    assert all(side % 16 == 0 for shape in products.shapes for side in shape)
    torch.testing.assert_close(found, expected)
    assert len(slopes) == sum(p.requires_grad for p in layer.parameters())
    for parameter, slope in zip(layer.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope)
    assert not any("forward" in vars(child) for child in layer.children())


def test_ranks_of_many_layers_are_few_products() -> None:
    layers = nn.ModuleList(layer_of("factors", rank, False) for rank in range(1, 33))
    x = torch.randn(1, 48).bfloat16()
    with even_ranks(layers), Products() as products:
        for layer in layers:
            layer(x)
    assert products.shapes == {(16, 48), (64, 16), (32, 48), (64, 32)}


def test_layers_that_share_down_stay_in_step() -> None:
    owner = layer_of("factors", 5, True)
    reader = SharedLowRankLinear.from_factors(owner, torch.randn(64, 5), None).bfloat16()
    x = torch.randn(2, 48).bfloat16()
    expected = [owner(x), reader(x)]
    for layers in ([owner, reader], [owner], [reader]):
        with even_ranks(nn.ModuleList(layers)):
            torch.testing.assert_close([owner(x), reader(x)], expected)


def test_what_is_exact_or_hooked_is_left() -> None:
    exact, hooked = LowRankLinear.from_factors(*factors(5, True)), layer_of("factors", 5, True)
    seen: list[tuple[int, ...]] = []
    hooked.down.register_forward_hook(lambda _m, _a, y: seen.append(tuple(y.shape)))
    for layer in (exact, hooked):
        x = torch.randn(2, 48, dtype=layer.up.weight.dtype)
        expected = layer(x)
        with even_ranks(nn.ModuleList([layer])):
            torch.testing.assert_close(layer(x), expected)
            assert "forward" not in vars(layer.down)
    assert seen == [(2, 5), (2, 5)]


def test_it_is_undone_after_an_error_and_may_be_nested() -> None:
    layer = layer_of("in", 5, True)
    with even_ranks(layer):
        with even_ranks(layer):
            layer(torch.randn(2, 48).bfloat16())
        assert "forward" in vars(layer.up)
    assert "forward" not in vars(layer.up)

    def fails() -> None:
        with even_ranks(layer):
            layer(torch.randn(2, 7).bfloat16())

    with pytest.raises(RuntimeError):
        fails()
    assert "forward" not in vars(layer.up)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + residual


class Looped(nn.Sequential):
    """Runs its blocks twice, so that they cannot be refitted block by block."""

    def forward(self, x: Tensor) -> Tensor:
        once: Tensor = super().forward(x)
        twice: Tensor = super().forward(once)
        return twice


@pytest.mark.parametrize("kind", [nn.Sequential, Looped])
@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_recovery_in_half_precision_takes_few_shapes(kind: Any, storage: str) -> None:
    """Refits, candidates, training of blocks and of the model, judging."""
    torch.manual_seed(0)
    model = kind(*(Residual() for _ in range(4))).bfloat16()
    data = list(torch.randn(64, 32).bfloat16().split(8))
    effort = lowrank.Recovery(block_steps=2, distill_steps=2)
    with Products() as products:
        lean, report = lowrank.compress(
            model, 0.6, data=data, method="whitened", policy="lossaware", effort=effort,
            align=1, storage=storage, copy=True, progress=False,
        )  # fmt: skip
    whole = any("in passes of the whole model" in note for note in report.notes)
    assert whole == (kind is Looped)
    ranks = {layer.rank for layer in lean.modules() if hasattr(layer, "rank")}
    assert any(rank % 16 for rank in ranks)
    assert (16, 32) in products.shapes or (32, 32) in products.shapes
    assert all(side % 16 == 0 for shape in products.shapes for side in shape)
