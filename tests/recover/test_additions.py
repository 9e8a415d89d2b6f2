"""Layers that are added to a stream, in ways of adding that models have, and what their refit is
worth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Recovery
from lowrank.methods.resolved import resolve
from lowrank.recover import sequential
from lowrank.recover.additions import added_to
from lowrank.recover.run import refitted_twins
from lowrank.recover.workbench import Workbench
from lowrank.walk.sites import find_sites
from tests import zoo
from tests.recover.test_sequential import model_of, rows


class Made(nn.Module):
    """Two layers, put together in a way of the test's."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.way(self, x))


def inner(self: Any, x: Tensor) -> Tensor:
    return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "found"),
    [
        (lambda self, x: x + inner(self, x), {"down"}),
        (lambda self, x: self.up(x) + x, {"up"}),  # its own input
        (lambda self, x: x + 0.5 * inner(self, x), set()),
        (lambda self, x: x * inner(self, x), set()),
        (lambda self, x: x + inner(self, inner(self, x)), set()),  # not in the first call
        (lambda self, x: self.norm(x + inner(self, x)) + inner(self, x), set()),  # nor the second
        (lambda self, x: x + self.up(x) + self.down(x), set()),  # no module reads the first sum
        (lambda self, x: inner(self, x), set()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added(way: Any, found: set[str], dtype: torch.dtype) -> None:
    model = Made(way).to(dtype)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    names = {"up", "down"}
    assert set(added_to(model, names, lambda: model(x))) == found


def test_both_sums_of_a_block_have_their_streams() -> None:
    model = zoo.llama().eval()
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    reads = added_to(model, names, lambda: model(ids))
    for block in ("model.layers.0", "model.layers.1"):
        assert reads.pop(f"{block}.self_attn.o_proj") == f"{block}.input_layernorm"
        assert reads.pop(f"{block}.mlp.down_proj") == f"{block}.post_attention_layernorm"
    assert not reads
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def call_of(chained: bool) -> Callable[..., Any]:
    return lambda self, x: self.blocks(x) + (0 if chained else 0 * self.blocks(x))


def refitted(model: nn.Module, ranks: dict[str, int | float]) -> Any:
    """The twin whose layers make up for all of the error, fitted to all rows."""
    seen = lowrank.calibrate(model, rows(), progress=False)
    plan = lowrank.plan(
        model, rank_pattern=ranks, target_modules=list(ranks), data=seen, method="whitened", align=1
    )
    sites = {site.name: site for site in find_sites(model)}
    work = [(sites[e.name], e, None) for e in plan.entries if e.target]
    resolved = resolve("whitened", data=True)
    return refitted_twins(
        Workbench(model, seen), [work], Recovery(dense=1.0, shrinkage=0.0), resolved
    )[0]


@pytest.mark.parametrize("chained", [True, False])
def test_a_layer_makes_up_for_the_streams_error(
    chained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second block reads the same features as the first, so that its sum can be exact, though
    the first keeps one direction of three; block by block and in whole passes."""
    model = model_of(call_of(chained), count=2)
    first, second = model.blocks
    with torch.no_grad():
        for block in (first, second):
            left = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
            block.down.weight.copy_(1e-3 * left @ block.down.weight[:3])
        second.up.weight.copy_(first.up.weight)
        second.up.bias.copy_(first.up.bias)

    def error() -> float:
        lean = refitted(model, {"blocks.0.down": 1, "blocks.1.down": 6})
        with torch.no_grad():
            off = [(lean(**b) - model(**b)).square().mean() for b in rows()]
        return float(torch.stack(off).mean())

    found = error()
    monkeypatch.setattr(sequential, "added_to", lambda *_: {})
    assert found < 0.01 * error()


def test_a_bias_makes_up_for_the_mean_error() -> None:
    """The mean of each sum over the rows fitted to is that of the dense model."""
    model = model_of(call_of(True))
    lean = refitted(model, {f"blocks.{i}.{name}": 4 for i in range(3) for name in ("up", "down")})
    fitted = torch.cat([batch["x"] for batch in rows()])
    with torch.no_grad():
        for count in (1, 2, 3):
            dense, compressed = (m.blocks[:count](fitted).mean(0) for m in (model, lean))
            torch.testing.assert_close(compressed, dense, rtol=1e-4, atol=1e-5)
