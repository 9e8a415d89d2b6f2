"""One forward pass shows groups, chains and shapes, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.calibration.observation import Observation, observe
from lowrank.calibration.running import SameTensor, first_tensor, forward, quiet, tensors_in
from lowrank.errors import LowrankError
from lowrank.walk.sites import find_sites
from tests.zoo import Custom, example, make, mlp, state_of, unchanged

LLAMA = "model.layers.{}."


def look(model: nn.Module, run: Callable[[], object]) -> Observation:
    return observe(model, [site for site in find_sites(model) if not site.reason], run)


def watched(kind: str) -> Observation:
    model = make(kind)
    return look(model, lambda: forward(model, example(kind)))


# Groups


def test_groups_of_a_llama() -> None:
    seen = watched("llama")
    for layer in range(2):
        at = LLAMA.format(layer)
        attention = tuple(f"{at}self_attn.{name}_proj" for name in "qkv")
        assert attention in seen.groups
        assert (f"{at}mlp.gate_proj", f"{at}mlp.up_proj") in seen.groups
        assert (f"{at}self_attn.o_proj",) in seen.groups
        assert (f"{at}mlp.down_proj",) in seen.groups
    assert ("lm_head",) in seen.groups
    assert len(seen.groups) == 9


def test_cross_attention_reads_the_encoder_in_every_block() -> None:
    at = "decoder.block.{}.layer.1.EncDecAttention.{}"
    expected = tuple(at.format(block, name) for block in range(2) for name in "kv")
    assert expected in watched("t5").groups


@pytest.mark.parametrize("kind", ["gpt2", "bert", "opt", "vit", "mixtral"])
def test_groups_read_one_tensor_and_no_two_groups_do(kind: str) -> None:
    """An oracle that keeps every input alive, so that identity alone tells them apart."""
    model = make(kind)
    held: dict[str, list[Tensor]] = {}
    handles = []
    for site in find_sites(model):
        if not site.reason and site.kind in ("linear", "conv"):
            hook = lambda _m, args, n=site.name: held.setdefault(n, []).append(args[0])  # noqa: E731
            handles.append(site.module.register_forward_pre_hook(hook))
    forward(model, example(kind))
    for handle in handles:
        handle.remove()
    by_input: dict[tuple[int, ...], list[str]] = {}
    for name, inputs in held.items():
        by_input.setdefault(tuple(id(tensor) for tensor in inputs), []).append(name)
    assert sorted(watched(kind).groups) == sorted(map(tuple, by_input.values()))


def test_order_and_shapes() -> None:
    model = mlp(4, 6, 5)
    model.add_module("unused", nn.Linear(5, 5))
    seen = look(model, lambda: model[2](model[0](torch.ones(3, 7, 4))))
    assert seen.order == ("0", "2")
    assert seen.shapes == {"0": (3, 7, 4), "2": (3, 7, 6)}


def test_order_is_that_of_the_calls() -> None:
    model = Custom(lambda self, x: self.a(self.b(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert look(model, lambda: model(torch.ones(1, 4))).order == ("b", "a")


def two(call: Callable[[Any, Tensor], Any]) -> Custom:
    return Custom(call, a=nn.Linear(4, 4), b=nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("call", "together"),
    [
        (lambda m, x: (m.a(x), m.b(x)), True),
        (lambda m, x: (m.a(x), m.b(x.view_as(x))), True),  # another view of the same numbers
        (lambda m, x: (m.a(x), m.b(x.clone())), False),
        (lambda m, x: (m.a(x), m.b(x.T.contiguous().T)), False),
        (lambda m, x: (m.a(x), m.b(x.T)), False),  # the same memory read the other way
        (lambda m, x: (m.a(x), m.b(x.add_(1))), False),  # the same memory, changed in between
        (lambda m, x: (m.a(x), m.b(x), m.b(x + 1)), False),  # not at every call
        (lambda m, x: (m.a(x), m.a(x + 1), m.b(x)), False),
        (lambda m, x: [(m.a(y), m.b(y)) for y in (x, x + 1)], True),
        (lambda m, x: (m.a(x), m.b(input=x)), True),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_what_makes_a_group(call: Callable[..., Any], together: bool, inference: bool) -> None:
    model = two(call)

    def run() -> None:
        with torch.inference_mode(inference):
            model(torch.randn(4, 4))

    assert (("a", "b") in look(model, run).groups) == together


def test_a_freed_tensor_whose_memory_is_given_anew_is_another_one() -> None:
    first = torch.ones(64)
    same = SameTensor(first)
    assert same(first)
    del first
    assert not same(torch.ones(64))


# Chains


@pytest.mark.parametrize(
    ("kind", "chains"),
    [
        ("llama", ["model.layers"]),
        ("gpt2", ["transformer.h"]),
        ("bert", ["bert.encoder.layer"]),
        ("vit", ["vit.layers"]),
        ("opt", ["model.decoder.layers"]),
        ("mixtral", ["model.layers"]),
        ("t5", ["encoder.block", "decoder.block"]),
    ],
)
def test_chains_of_blocks(kind: str, chains: list[str]) -> None:
    assert watched(kind).chains == tuple((f"{name}.0", f"{name}.1") for name in chains)


def test_a_sequential_is_a_chain_by_its_own_names() -> None:
    model = mlp(4, 5, 6)
    assert look(model, lambda: model(torch.ones(1, 4))).chains == (("0", "1", "2"),)
    named = nn.Sequential()
    named.add_module("first", nn.Linear(4, 4))
    named.add_module("then", nn.Linear(4, 4))
    inside = Custom(lambda self, x: self.body(x), body=named)
    assert look(inside, lambda: inside(torch.ones(1, 4))).chains == (("body.first", "body.then"),)


def test_only_the_outermost_chain_counts() -> None:
    model = nn.Sequential(mlp(4, 5, 4), mlp(4, 5, 4))
    assert look(model, lambda: model(torch.ones(1, 4))).chains == (("0", "1"),)


def test_a_member_that_stands_in_several_places() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 4))
    assert look(model, lambda: model(torch.ones(1, 4))).chains == (tuple("01234"),)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: sum(part(x) for part in m.parts),  # branches
        lambda m, x: m.parts[1](m.parts[0](x)),  # a member is never called
        lambda m, x: m.parts[2](m.parts[0](m.parts[1](x))),  # another order
        lambda m, x: m.parts[2](m.parts[1](m.parts[0](x)) * 2),  # something in between
    ],
)
def test_a_list_that_is_no_chain(call: Callable[..., Any]) -> None:
    parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = Custom(call, parts=parts)
    assert look(model, lambda: model(torch.ones(1, 4))).chains == ()


def test_blocks_may_pass_tuples_and_dicts() -> None:
    class Block(nn.Module):
        def forward(self, state: dict[str, Any]) -> dict[str, Any]:
            return {"step": 1, "hidden": (state["hidden"][0] + 1,)}

    model = nn.Sequential(Block(), Block())
    seen = look(model, lambda: model({"hidden": (torch.ones(2),)}))
    assert seen.chains == (("0", "1"),)


# No trace


def noisy() -> Custom:
    """A model that draws numbers even in eval mode, with dropout, batch norm and gradients."""
    model = Custom(
        lambda self, x: self.body(x + torch.randn_like(x)),
        body=nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4)),
    )
    model(torch.randn(5, 4)).sum().backward()
    return model


def test_observing_leaves_no_trace() -> None:
    model = noisy()
    model.body[1].eval()  # modes differ from module to module
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    with unchanged(model):
        look(model, lambda: model(torch.randn(5, 4)))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_and_modes_are_restored_when_the_forward_raises(error: type) -> None:
    def fail(self: Any, x: Tensor) -> None:
        self.body(x)
        raise error

    model = Custom(fail, body=mlp(4, 4, 4)).train()
    before = state_of(model)
    with pytest.raises(error):
        look(model, lambda: model(torch.ones(2, 4)))
    assert state_of(model) == before


def test_quiet_runs_in_eval_mode_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    model[0].eval()
    with quiet(model):
        assert not any(module.training for module in model.modules())
        assert not model(torch.ones(1, 4)).requires_grad
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()


# Nested values


def test_tensors_in_nested_values() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    output = BaseModelOutput(last_hidden_state=a, hidden_states=(b, c))
    assert [t.numel() for t in tensors_in([output, 5, {"x": (b,)}])] == [1, 2, 3, 2]
    assert first_tensor(((), {"x": [None, b]})) is b
    assert first_tensor(("text", 3, {"x": []})) is None


# Numbers that a layer cannot multiply


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_data_of_another_dtype_names_the_layer_and_both_dtypes(dtype: torch.dtype) -> None:
    model = mlp(6, 5)
    with pytest.raises(LowrankError, match=rf"0: its input is {dtype}, its weight torch.float32"):
        look(model, lambda: model(torch.ones(3, 6).to(dtype)))


def test_autocast_converts_floats() -> None:
    model = mlp(6, 5)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.ones(3, 6, dtype=torch.bfloat16))

    assert look(model, run).order == ("0",)


@pytest.mark.parametrize("deep", [False, True])
def test_an_encoder_and_what_pools_it_are_no_chain_of_two(deep: bool) -> None:
    """Run as one block, all of the encoder would run for each of its layers."""
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    encoder = nn.ModuleDict({"blocks": blocks})
    encoder.forward = lambda x: blocks(x)
    model = nn.Sequential(encoder if deep else blocks, nn.Tanh(), nn.Linear(4, 2))
    inner = "0.blocks" if deep else "0"
    seen = look(model, lambda: model(torch.ones(1, 4)))
    assert seen.chains == (tuple(f"{inner}.{i}" for i in range(3)),)


def test_stages_of_like_size_are_a_chain() -> None:
    stages = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
    model = nn.Sequential(*stages)
    assert look(model, lambda: model(torch.ones(1, 4))).chains == (("0", "1", "2"),)
