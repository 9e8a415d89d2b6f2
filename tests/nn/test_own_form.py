"""A form of one's own is one file: its module, registered from outside, and a method that makes it.

Nothing in the library knows the block-diagonal layer below, and it goes the whole way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, Plan
from lowrank.nn import FACTORED, LinearForm, LowRankLinear, register
from lowrank.types import Cost, Curve, Option, Site, Size, Statistics
from lowrank.walk import layouts


class TwoBlock(LinearForm):
    """W = diag(A, B): A (rows, columns) of the first inputs and outputs, B of the others."""

    STORAGE = "two-block"
    SIZE = ("rows", "columns")
    REFITTED = True

    def __init__(
        self, in_features: int, out_features: int, rows: int, columns: int, *, bias: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.first = nn.Parameter(torch.empty(rows, columns, device="meta"))
        self.second = nn.Parameter(
            torch.empty(out_features - rows, in_features - columns, device="meta")
        )
        self.bias = nn.Parameter(torch.empty(out_features, device="meta")) if bias else None

    @classmethod
    def empty(cls, **spec: Any) -> Self:
        return cls(**spec)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, rows: int, columns: int) -> Self:
        outputs, inputs = weight.shape
        layer = cls(inputs, outputs, rows, columns, bias=bias is not None)
        layer.first = nn.Parameter(weight[:rows, :columns].clone())
        layer.second = nn.Parameter(weight[rows:, columns:].clone())
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer

    @classmethod
    def size_cost(
        cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0
    ) -> Cost | None:
        (outputs, inputs), (rows, columns) = shape, size
        if not (0 < rows < outputs and 0 < columns < inputs):
            return Cost(outputs * inputs, itemsize * outputs * inputs, outputs * inputs)
        numbers = rows * columns + (outputs - rows) * (inputs - columns)
        return Cost(numbers, itemsize * numbers, numbers)

    @classmethod
    def note(cls, layers: Sequence[Self]) -> str:
        return f"two blocks on the diagonal: {len(layers)} layers"

    def forward(self, x: Tensor) -> Tensor:
        columns = self.first.shape[1]
        parts = (x[..., :columns] @ self.first.T, x[..., columns:] @ self.second.T)
        y = torch.cat(parts, -1)
        return y if self.bias is None else y + self.bias

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.first.dtype
        return torch.block_diag(self.first.to(dtype), self.second.to(dtype))

    def spec(self) -> dict[str, Any]:
        rows, columns = self.first.shape
        return {
            "in_features": self.in_features, "out_features": self.out_features,
            "rows": rows, "columns": columns, "bias": self.bias is not None,
        }  # fmt: skip

    def cost(self) -> Cost:
        numbers = self.first.numel() + self.second.numel()
        return Cost(numbers, numbers * self.first.dtype.itemsize, numbers)


@dataclass(frozen=True)
class TwoBlocks:
    """The better of a few cuts; every entry outside the blocks is lost."""

    seed: int = 0
    kinds = frozenset({"linear"})
    needs = frozenset[str]()
    own_form = "two-block"

    def curve(self, site: Site, stats: Statistics) -> Curve:
        weight = layouts.matrix(site.module).detach().double()
        (outputs, inputs), total = site.shape, float(weight.square().sum())
        options: list[Option] = []
        for k in (4, 3, 2):  # the more uneven, the less is lost and the more is stored
            rows, columns = outputs * k // 8, inputs * k // 8
            cost = TwoBlock.size_cost(site.shape, (rows, columns), itemsize=4)
            assert cost is not None
            kept = weight[:rows, :columns].square().sum() + weight[rows:, columns:].square().sum()
            error = total - float(kept)
            if all(error < other.error for other in options):
                options.append(Option("two-blocks", (rows, columns), "two-block", cost, error))
        dense = Option("dense", None, "dense", site.cost, 0.0)
        return Curve(site.names, (*options, dense), total, None, "weight", exact=True)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        assert option.size is not None
        return TwoBlock.of(layouts.matrix(module).detach(), layouts.bias(module), *option.size)


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """Registered for the time of a test."""
    register(TwoBlock)
    yield
    del FACTORED["TwoBlock"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 16, bias=False)).eval()


ROWS = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))


def test_from_the_plan_to_the_file_and_back(tmp_path: Path) -> None:
    model, x = net(), ROWS[:5]
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    plan = lowrank.plan(model, 0.6, method=TwoBlocks(), target_modules="all")
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert {entry.storage for entry in plan.entries} == {"two-block"}
    edited = again.edit({"0": (10, 18)})
    assert edited.entries[0].cost == Cost(10 * 18 + 30 * 6, 4 * 360, 360)
    small, report = lowrank.apply(model, edited, method=TwoBlocks(), data=None)
    first, second = small[0], small[2]
    assert isinstance(first, TwoBlock)
    assert isinstance(second, TwoBlock)
    assert torch.equal(first.first, weights[0][:10, :18])
    assert report.sites[0].measured == pytest.approx(
        float(weights[0][:10, 18:].square().sum() + weights[0][10:, :18].square().sum()), rel=1e-5
    )
    assert "two blocks on the diagonal: 2 layers" in str(report)
    assert "10,18" in str(report)
    want = small(x)
    lowrank.save(small, tmp_path / "small")
    loaded = lowrank.load(tmp_path / "small", net())
    assert isinstance(loaded[0], TwoBlock)
    assert torch.equal(loaded(x), want)
    dense = lowrank.to_dense(loaded)
    assert [type(layer) for layer in dense] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(dense(x), want)


def test_a_size_that_the_form_does_not_have_is_refused() -> None:
    plan = lowrank.plan(net(), 0.6, method=TwoBlocks())
    with pytest.raises(LowrankError, match=r"2 integers >= 1 \(rows, columns\), got 7"):
        plan.edit({"0": 7})
    with pytest.raises(LowrankError, match="not smaller than the dense layer"):
        plan.edit({"0": (40, 3)})


@torch.no_grad()
def test_recovery_refits_it_for_the_stream_that_it_reads() -> None:
    """On data the second layer reads what the first one gives: its outputs come nearer."""
    dense, away = net(), {}
    for effort in (None, lowrank.Recovery(shrinkage=0.0)):
        small, _ = lowrank.compress(
            net(), 0.6, method=TwoBlocks(), policy="uniform", data=ROWS, effort=effort,
            target_modules="all", progress=False,
        )  # fmt: skip
        assert isinstance(small[2], TwoBlock)
        away[effort is not None] = float((small(ROWS) - dense(ROWS)).square().mean())
    assert away[True] < 0.9 * away[False]


def test_names_that_are_taken_are_refused() -> None:
    """Also those of a form that was registered from outside."""
    assert register(TwoBlock) is TwoBlock  # twice is once

    class Other(LinearForm):
        STORAGE = "two-block"

    with pytest.raises(LowrankError, match="a storage 'two-block' is already registered"):
        register(Other)
    with pytest.raises(LowrankError, match="a form LowRankLinear"):
        register(type("LowRankLinear", (LinearForm,), {"STORAGE": "third"}))
    with pytest.raises(LowrankError, match="a form is a subclass"):
        register(nn.Linear)  # type: ignore[arg-type]
    assert FACTORED["LowRankLinear"] is LowRankLinear
