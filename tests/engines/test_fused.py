"""Layers of a checkpoint in one of an engine: their products, on one device and on several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank import LowrankError
from lowrank.engines.fused import Arriving, cut_of, parts_of, placeholders, put_fused
from lowrank.nn import LowRankLinear, PivotedLinear, SharedLowRankLinear, describe
from tests.zoo import said

WIDTH, HEAD, HEADS, GROUPS = 32, 4, 8, 2  # inputs; numbers of a head, heads, heads of keys
SIZES = {"q": HEADS * HEAD, "k": GROUPS * HEAD, "v": GROUPS * HEAD}
KINDS = ("dense", "plain", "out", "in")


def made(
    kind: str, out: int, width: int, rank: int, *, bias: bool = False, seed: int = 0
) -> nn.Module:
    """A layer in float64, so that no difference hides in rounding."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shift = normal(out) if bias else None
    if kind == "dense":
        layer = nn.Linear(width, out, bias=bias, dtype=torch.float64)
        layer.weight = nn.Parameter(normal(out, width))
        if bias:
            layer.bias = nn.Parameter(normal(out))
        return layer
    down, up = normal(rank, width), normal(out, rank)
    if kind == "plain":
        return LowRankLinear.from_factors(down, up, shift)
    return PivotedLinear.from_factors(down, up, shift, side=kind)


class Layer(nn.Module):
    """What an engine's layer is to us: parameters that take tensors, and a bias of its own."""

    def __init__(self, names: Sequence[str], specs: Any, bias: int = 0) -> None:
        super().__init__()
        self.parts = Arriving("layer", parts_of(names, specs, "the engine"))
        placeholders(self, self.parts, torch.float64)
        shift = nn.Parameter(torch.zeros(bias, dtype=torch.float64), requires_grad=False)
        self.bias = shift if bias else None

    def load(self, name: str, tensor: Tensor, shard: Any = None) -> None:
        parameter: Any = self.get_parameter(name)
        parameter.weight_loader(parameter, tensor, shard)


Tamper = Callable[[dict[str, dict[str, Tensor]]], None]


def served(
    layers: dict[str, nn.Module],
    outputs: Sequence[int],
    *,
    rank: int = 0,
    world: int = 1,
    row: bool = False,
    replicas: int = 1,
    tamper: Tamper = lambda _: None,
    respec: Callable[[dict[str, Any]], None] = lambda _: None,
    bias: bool = False,
) -> Layer:
    """The engine's layer on one device.

    Args:
        outputs: its own there.
        tamper: changes what the files hold.
        respec: changes what the config says.
    """
    specs = {n: dict(describe(m)) for n, m in layers.items() if not isinstance(m, nn.Linear)}
    for name, module in layers.items():
        if isinstance(module, SharedLowRankLinear):
            specs[name]["shared"] = next(n for n, m in layers.items() if m is module.owner)
    respec(specs)
    layer = Layer(list(layers), specs, sum(outputs) if bias else 0)
    held = {name: dict(module.state_dict()) for name, module in layers.items()}
    for name in specs:
        held[name]["weight"] = torch.zeros(1, dtype=torch.float64)  # the guard
    tamper(held)
    for number, (name, tensors) in enumerate(held.items()):
        shard = name if name in SIZES else number if len(layers) > 1 else None
        for key, tensor in tensors.items():
            if key == "bias":
                continue  # the engine's own loader's
            layer.load(key, tensor, shard)
    times = 1 if row else world
    width = next(m.in_features for m in layers.values())
    here = width // world if row else width
    whole = sum(outputs) * times
    cut = cut_of(
        len(layers), (here, width), outputs, whole, rank=rank, world=world, replicas=replicas
    )
    put_fused(layer, layer.parts, cut, here, outputs)
    return layer


def weight_of(layer: nn.Module) -> Tensor:
    return layer.weight if isinstance(layer, nn.Linear) else layer.dense_weight()


def attention(kinds: Sequence[str], ranks: Sequence[int] = (9, 3, 5)) -> dict[str, nn.Module]:
    each = enumerate(zip(SIZES.items(), kinds, ranks, strict=True))
    return {
        name: made(kind, out, WIDTH, rank, seed=seed) for seed, ((name, out), kind, rank) in each
    }


def heads_of(
    layers: dict[str, nn.Module], world: int, x: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Queries, keys and values of all devices, put together."""
    replicas = max(world // GROUPS, 1)
    q, kv = SIZES["q"] // world, SIZES["k"] * replicas // world
    found: dict[str, list[Tensor]] = {name: [] for name in SIZES}
    for rank in range(world):
        layer = served(layers, (q, kv, kv), rank=rank, world=world, replicas=replicas, **options)
        for name, part in zip(SIZES, layer.lowrank(x).split((q, kv, kv), -1), strict=True):
            if name == "q" or rank % replicas == 0:
                found[name].append(part)
    return {name: torch.cat(parts, -1) for name, parts in found.items()}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kinds", [
    ("plain", "plain", "plain"), ("plain", "dense", "plain"), ("out", "plain", "dense"),
    ("in", "in", "out"), ("dense", "in", "plain"), ("out", "out", "out"),
])  # fmt: skip
def test_queries_keys_and_values(kinds: tuple[str, ...], world: int) -> None:
    """Ranks differ, parts may be dense, and devices share heads of keys."""
    layers, x = attention(kinds), torch.randn(3, 5, WIDTH, dtype=torch.float64)
    for name, found in heads_of(layers, world, x).items():
        torch.testing.assert_close(found, x @ weight_of(layers[name]).T)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_inputs_that_are_cut_add_up(kind: str, world: int) -> None:
    layer = made(kind, 12, WIDTH, 7)
    x, step = torch.randn(4, WIDTH, dtype=torch.float64), WIDTH // world
    parts = [
        served({"o": layer}, (12,), rank=rank, world=world, row=True).lowrank(
            x[:, rank * step : (rank + 1) * step]
        )
        for rank in range(world)
    ]
    torch.testing.assert_close(sum(parts), x @ weight_of(layer).T)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_layer_that_the_checkpoint_fuses_itself(kind: str, world: int) -> None:
    """One factored matrix of queries, keys and values: each device has rows of all three."""
    layer, x = (
        made(kind, sum(SIZES.values()), WIDTH, 11),
        torch.randn(4, WIDTH, dtype=torch.float64),
    )
    sizes = [size // world for size in SIZES.values()]
    whole = (x @ weight_of(layer).T).split(list(SIZES.values()), -1)
    for rank in range(world):
        found = served({"all": layer}, sizes, rank=rank, world=world).lowrank(x).split(sizes, -1)
        for got, want, size in zip(found, whole, sizes, strict=True):
            torch.testing.assert_close(got, want[:, rank * size : (rank + 1) * size])


@pytest.mark.parametrize("world", [1, 2])
def test_one_basis_for_all(world: int) -> None:
    owner = made("plain", SIZES["q"], WIDTH, 9)
    layers = {
        "q": owner,
        **{
            name: SharedLowRankLinear.from_factors(
                owner, torch.randn(SIZES[name], 9, dtype=torch.float64), None
            )
            for name in ("k", "v")
        },
    }
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    for name, found in heads_of(layers, world, x).items():
        torch.testing.assert_close(found, x @ weight_of(layers[name]).T)
    assert len(served(layers, tuple(SIZES.values())).lowrank.first.weight) == 9  # held once


def test_what_reads_one_input_is_one_product() -> None:
    layer = served(attention(("plain", "dense", "plain")), tuple(SIZES.values())).lowrank
    assert layer.first.weight.shape == (9 + SIZES["k"] + 5, WIDTH)
    assert [None if p.up is None else p.up.weight.shape for p in layer.pieces] == [
        (32, 9),
        None,
        (8, 5),
    ]


def test_placeholders_are_gone_but_for_the_weight() -> None:
    """Adapters of engines ask a layer's weight for its device."""
    layer = served(attention(("plain", "in", "out")), tuple(SIZES.values()))
    assert {name for name, _ in layer.named_children()} == {"lowrank"}
    assert {name for name, _ in layer.named_parameters(recurse=False)} == {"weight"}


@pytest.mark.parametrize("kinds", [("plain", "plain"), ("plain", "out"), ("dense", "plain")])
@pytest.mark.parametrize("world", [1, 2])
def test_biases_that_come_with_the_factors(kinds: tuple[str, ...], world: int) -> None:
    layers = {n: made(k, 12, WIDTH, 5, bias=True) for n, k in zip("gu", kinds, strict=True)}
    for rank in range(world):
        here = 12 // world
        layer = served(layers, (here, here), rank=rank, world=world, bias=True)
        for part, (module, got) in enumerate(
            zip(layers.values(), layer.bias.split(here), strict=True)
        ):
            rows = slice(rank * here, (rank + 1) * here)
            if kinds[part] == "plain":
                assert torch.equal(got, module.bias[rows])
            else:  # under the layer's own name: the engine loads it
                assert not got.any()


def test_a_bias_that_the_engine_has_no_place_for() -> None:
    with pytest.raises(LowrankError, match="layer has no bias, but its factors have one") as caught:
        served({"g": made("plain", 12, WIDTH, 5, bias=True)}, (12,))
    said(caught)


def test_compiled_whole_without_a_break() -> None:
    layer = served(attention(("plain", "in", "out")), tuple(SIZES.values())).lowrank
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for rows in (5, 17, 3):
        x = torch.randn(rows, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(run(x), layer(x))


# What must not go unnoticed


def swap(held: dict[str, dict[str, Tensor]]) -> None:
    held["q"], held["k"] = held["k"], held["q"]


def swap_alike(held: dict[str, dict[str, Tensor]]) -> None:
    held["k"], held["v"] = held["v"], held["k"]


def lose(name: str, key: str) -> Tamper:
    def change(held: dict[str, dict[str, Tensor]]) -> None:
        del held[name][key]

    return change


def change(name: str, key: str, how: Callable[[Tensor], Tensor]) -> Tamper:
    def apply(held: dict[str, dict[str, Tensor]]) -> None:
        held[name][key] = how(held[name][key])

    return apply


def off_by_one(specs: dict[str, Any]) -> None:
    specs["q"]["rank"] += 1


def forget(specs: dict[str, Any]) -> None:
    del specs["v"]


MUTATIONS: dict[str, dict[str, Any]] = {
    "parts swapped": {"tamper": swap},
    "rank off by one": {"respec": off_by_one},
    "a factor missing": {"tamper": lose("q", "up.weight")},
    "a part missing": {"tamper": lambda held: held.pop("v")},
    "a dense part missing": {"tamper": lose("k", "weight")},
    "not in the config": {"respec": forget},
    "transposed": {"tamper": change("q", "down.weight", lambda t: t.T)},
    "too few rows": {"tamper": change("k", "weight", lambda t: t[:-1])},
    "dense in its place": {"tamper": change("q", "weight", lambda _: torch.zeros(32, 32))},
}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("wrong", MUTATIONS)
def test_it_is_refused(wrong: str, world: int) -> None:
    layers, x = attention(("plain", "dense", "plain")), torch.randn(2, WIDTH, dtype=torch.float64)
    with pytest.raises(LowrankError) as caught:
        heads_of(layers, world, x, **MUTATIONS[wrong])
    said(caught)


def test_parts_of_one_size_that_are_swapped_change_the_result() -> None:
    layers = attention(("plain", "plain", "plain"), (9, 5, 5))
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    found = heads_of(layers, 1, x, tamper=swap_alike)
    assert not torch.allclose(found["k"], x @ weight_of(layers["k"]).T)


def test_forms_that_are_not_served_are_named_with_what_to_do() -> None:
    spec = {"type": "DenseSparseLinear", "in_features": 8}
    with pytest.raises(LowrankError) as caught:
        parts_of(["a.q"], {"a.q": spec}, "vLLM")
    message = said(caught)
    assert "a.q is a DenseSparseLinear (storage 'dense-sparse')" in message
    assert "storage='factors' or 'pivoted'" in message
    assert "lowrank merge" in message


def test_a_basis_outside_of_the_layer() -> None:
    spec = {"type": "SharedLowRankLinear", "shared": "b.q"}
    with pytest.raises(LowrankError, match=r"shares the basis of b\.q, which vLLM computes in"):
        parts_of(["a.q"], {"a.q": spec}, "vLLM")


def test_a_shard_that_is_none() -> None:
    layer = Layer(["q"], {"q": describe(made("plain", 8, 8, 2))})
    with pytest.raises(LowrankError, match="no part 3 among 1"):
        layer.load("down.weight", torch.zeros(2, 8), 3)
    with pytest.raises(LowrankError, match="2 layers of the checkpoint for 3 of the engine's"):
        cut_of(2, (8, 8), (4, 4, 4), 12, rank=0, world=1)


def test_the_shard_may_be_said_by_the_tensor() -> None:
    layers = attention(("plain", "plain", "plain"))
    specs = {name: describe(module) for name, module in layers.items()}
    layer = Layer(list(layers), specs)
    for name, module in layers.items():
        for key, tensor in module.state_dict().items():
            tensor.shard_id = name
            layer.load(key, tensor)
    put_fused(
        layer,
        layer.parts,
        cut_of(3, (WIDTH, WIDTH), (32, 8, 8), 48, rank=0, world=1),
        WIDTH,
        (32, 8, 8),
    )
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    want = torch.cat([x @ weight_of(module).T for module in layers.values()], -1)
    torch.testing.assert_close(layer.lowrank(x), want)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kinds", [("plain", "out", "in"), ("out", "dense", "plain")])
def test_a_layer_that_the_checkpoint_fuses_and_lowrank_split(
    kinds: tuple[str, ...], world: int
) -> None:
    """Parts lie below the layer's name, by their numbers, with their biases."""
    sizes = list(SIZES.values())
    each = enumerate(zip(sizes, kinds, strict=True))
    layers = [made(kind, out, WIDTH, 5, bias=True, seed=i) for i, (out, kind) in each]
    specs: dict[str, Any] = {"all": {"type": "SplitLinear", "sizes": sizes}}
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    for i, module in enumerate(layers):
        if not isinstance(module, nn.Linear):
            specs[f"all.{i}"] = describe(module)
    for rank in range(world):
        here = [size // world for size in sizes]
        layer = Layer(["all"], specs, sum(here))
        layer.load("weight", torch.zeros(1))  # the guard
        for i, module in enumerate(layers):
            for key, tensor in module.state_dict().items():
                layer.load(f"{i}.{key}", tensor)
        cut = cut_of(3, (WIDTH, WIDTH), here, sum(sizes), rank=rank, world=world)
        put_fused(layer, layer.parts, cut, WIDTH, here)
        found = (layer.lowrank(x) + layer.bias).split(here, -1)
        for module, got, size in zip(layers, found, here, strict=True):
            torch.testing.assert_close(got, module(x)[:, rank * size : (rank + 1) * size])
