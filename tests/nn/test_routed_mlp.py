"""An MLP in experts: exact with all of them, equal ways to compute it, files, and a way back."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from lowrank.errors import LowrankError
from lowrank.nn import RoutedMLP, build, describe, is_factored, routed_mlp
from lowrank.nn.routed_mlp import ACTIVATIONS

from ..draws import normal

EXPERTS, NEURONS, WIDTH, OUT = 4, 24, 10, 7


@pytest.fixture(autouse=True)
def even_small_experts_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_mlp, "SMALL", 0)
    monkeypatch.setattr(routed_mlp, "FEW", 0)


def layers(*, gated: bool = True, bias: bool = False) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    inner = {name: nn.Linear(WIDTH, NEURONS, bias=bias) for name in ("g", "u")[not gated :]}
    return {**inner, "d": nn.Linear(NEURONS, OUT, bias=bias)}


def shuffled(seed: int = 0) -> Tensor:
    return torch.randperm(NEURONS, generator=torch.Generator().manual_seed(seed))


def routed(active: int = 2, **options: Any) -> RoutedMLP:
    mlp = RoutedMLP.split(layers(**options), "silu", shuffled(), EXPERTS, active)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        mlp.router.weight.normal_(generator=draw)
        mlp.scale.copy_(1 + torch.rand(EXPERTS, generator=draw))
    return mlp


def dense(held: dict[str, nn.Linear], x: Tensor, activation: str = "silu") -> Tensor:
    *inner, down = held.values()
    hidden = ACTIVATIONS[activation](inner[0](x))
    y: Tensor = down(hidden * inner[1](x) if len(inner) > 1 else hidden)
    return y


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 9])
def test_all_experts_are_the_dense_mlp(gated: bool, bias: bool, rows: int) -> None:
    held = layers(gated=gated, bias=bias)
    x = torch.randn(rows, WIDTH)
    want = dense(held, x)
    for activation in ("silu", "gelu-tanh"):
        mlp = RoutedMLP.split(held, activation, shuffled(), EXPERTS)
        torch.testing.assert_close(mlp(x), dense(held, x, activation), rtol=0, atol=1e-5)
    mlp = RoutedMLP.split(held, "silu", shuffled(), EXPERTS)
    every = torch.arange(EXPERTS).expand(rows, -1)
    mask = torch.ones(rows, EXPERTS)
    with torch.no_grad():
        shift = 0 if mlp.layer("down").bias is None else mlp.layer("down").bias
        parts = mlp.parts(x).sum(1)
        ways = [mlp._grouped(x, mask, every) + shift, mlp._masked(x, mask), parts + shift]
    for y in ways:
        torch.testing.assert_close(y, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("active", [1, 2, 3])
@pytest.mark.parametrize("shape", [(), (1,), (9,), (2, 5), (0,)])
def test_what_is_skipped_is_what_masking_leaves_out(active: int, shape: tuple[int, ...]) -> None:
    mlp = routed(active, bias=True)
    x = normal(*shape, WIDTH).float()
    with torch.no_grad():
        y = mlp(x)
        rows = x.reshape(-1, WIDTH)
        scores = mlp.router(rows)
        mask = torch.zeros_like(scores).scatter(1, scores.topk(active, 1).indices, 1.0)
        kept = (mlp.parts(rows) * mask[..., None]).sum(1) * mlp.scale[active - 1]
        kept = kept + mlp.layer("down").bias
    assert y.shape == (*shape, OUT)
    torch.testing.assert_close(y, kept.reshape(y.shape), rtol=0, atol=1e-5)
    assert torch.equal(mask.sum(1), torch.full((len(rows),), float(active)))


def test_experts_that_are_not_chosen_are_not_multiplied() -> None:
    mlp = routed(2)
    size = NEURONS // EXPERTS
    mlp.router.weight.data.zero_()
    mlp.router.bias.data.copy_(torch.tensor([1.0, 0.0, 2.0, 0.0]))
    for row in (slice(size, 2 * size), slice(3 * size, None)):
        mlp.layer("up").weight.data[row] = torch.nan
    for rows in (1, 6):
        assert bool(mlp(torch.randn(rows, WIDTH)).isfinite().all())


@pytest.mark.parametrize(
    ("small", "large", "few", "tokens", "skipped"),
    [
        (60, 999, 99, 1, True),
        (61, 999, 99, 1, False),
        (60, 999, 3, 6, True),
        (60, 999, 3, 5, False),
        (60, 60, 3, 5, True),
        (60, 60, 3, 0, False),
    ],
)
def test_experts_are_skipped_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, small: int, large: int, few: int, tokens: int, skipped: bool
) -> None:
    for name, value in (("SMALL", small), ("LARGE", large), ("FEW", few)):
        monkeypatch.setattr(routed_mlp, name, value)
    assert routed(2)._skips(torch.zeros(tokens, WIDTH)) is skipped


def test_the_saved_tensors_are_those_of_the_dense_mlp_in_another_order() -> None:
    held, order = layers(bias=True), shuffled()
    state = RoutedMLP.split(held, "silu", order, EXPERTS).state_dict()
    assert torch.equal(state["g.weight"], held["g"].weight[order])
    assert torch.equal(state["u.bias"], held["u"].bias[order])
    assert torch.equal(state["d.weight"], held["d"].weight[:, order])
    assert torch.equal(state["d.bias"], held["d"].bias)
    again = layers(bias=True)
    nn.ModuleDict(again).load_state_dict({k: v for k, v in state.items() if k[0] in "gud"})
    x = torch.randn(5, WIDTH)
    torch.testing.assert_close(dense(again, x), dense(held, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gated", [True, False])
def test_spec_and_file_rebuild_it_bit_for_bit(dtype: torch.dtype, gated: bool) -> None:
    mlp = routed(gated=gated, bias=gated).to(dtype)
    spec = json.loads(json.dumps(describe(mlp)))
    again = build(spec, "here")
    assert is_factored(again)
    assert all(tensor.is_meta for tensor in again.state_dict().values())
    again.load_state_dict(load(save(mlp.state_dict())), assign=True)
    assert describe(again) == spec
    x = normal(3, WIDTH).to(dtype)
    with torch.no_grad():
        assert torch.equal(again(x), mlp(x))
        assert mlp(x).dtype == dtype
        assert torch.equal(copy.deepcopy(mlp)(x), mlp(x))


def test_cost_counts_what_is_stored_and_what_is_multiplied_apart() -> None:
    mlp = routed(1)
    weights = NEURONS * (2 * WIDTH + OUT)
    router = EXPERTS * WIDTH
    cost = mlp.cost()
    stored = weights + router + EXPERTS
    assert (cost.params, cost.bytes) == (stored, 4 * stored)
    assert stored == sum(t.numel() for k, t in mlp.state_dict().items() if not k.endswith("bias"))
    assert cost.macs == weights // EXPERTS + router
    mlp.active = EXPERTS
    assert mlp.cost().macs == weights
    assert f"{stored:,} numbers; a token multiplies by {weights:,}" in RoutedMLP.note([mlp])


def test_gradients_reach_the_chosen_experts_and_the_router() -> None:
    mlp = routed(2)
    x = torch.randn(6, WIDTH)
    with torch.no_grad():
        want = mlp(x)
    y = mlp(x)
    torch.testing.assert_close(y.detach(), want, rtol=0, atol=1e-6)
    y.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in mlp.parameters())


def test_a_graph_computes_the_same() -> None:
    mlp = routed(2).eval()
    x = torch.randn(4, WIDTH)
    program = torch.export.export(mlp, (x,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), mlp(x), rtol=0, atol=1e-5)


def test_a_layer_that_became_something_else_is_called_as_it_is() -> None:
    mlp = routed(2)
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        before = mlp(x)
        mlp.layer("down").register_forward_hook(lambda _m, _a, y: 2 * y)
        torch.testing.assert_close(mlp(x), 2 * before, rtol=0, atol=1e-5)


def test_it_becomes_the_module_that_it_was() -> None:
    held = layers()
    before = nn.ModuleDict({**held, "act": nn.SiLU()})
    mlp = RoutedMLP.split(held, "silu", shuffled(), EXPERTS, 2)
    with pytest.raises(LowrankError, match=r"2 of 4 experts .* set \.active = \.experts first"):
        mlp.whole()
    mlp.active = EXPERTS
    with pytest.raises(LowrankError, match="without the MLP that it replaces"):
        mlp.whole()
    mlp.remember(before)
    whole: Any = copy.deepcopy(mlp).whole()
    assert type(whole) is nn.ModuleDict
    assert list(whole) == ["g", "u", "d", "act"]
    x = torch.randn(3, WIDTH)
    again = {name: whole[name] for name in held}
    torch.testing.assert_close(dense(again, x), dense(held, x), rtol=0, atol=1e-5)
    assert not torch.equal(whole["d"].weight, held["d"].weight)
    with pytest.raises(LowrankError, match="no one dense weight"):
        mlp.dense_weight()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"experts": 5},
            r"24 neurons cannot be cut into 5 equal experts: .* 2, 3, 4, 6, 8, 12, 24",
        ),
        ({"experts": 0}, "into 0 equal experts"),
        ({"active": 5}, r"active must be in \[1, 4\], got 5"),
        ({"active": 0}, r"active must be in \[1, 4\], got 0"),
        ({"activation": "sillu"}, "did you mean 'silu'"),
        ({"layers": "g"}, "two or three layers"),
        ({"layers": "g router d"}, "none of them 'router'"),
        ({"layers": "g g d"}, "distinct names"),
        ({"biases": "x"}, "not among"),
        ({"layers": 3}, "sizes must be integers"),
    ],
)
def test_a_bad_spec_is_one_clear_error(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(LowrankError, match=said):
        build({**describe(routed()), **changed}, "model.mlp")
