"""Experts as layers: found by what a mixture computes, and put back as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.nn.expert_weights import ExpertWeights
from lowrank.walk import experts
from lowrank.walk.parts import join_parts, parts_apart, separate_parts
from lowrank.walk.surgery import copied

from ..mixtures import FAMILIES, mixture
from ..zoo import tokens, unchanged


def _split(model: nn.Module) -> list[ExpertWeights]:
    return [module for module in model.modules() if isinstance(module, ExpertWeights)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_every_family_computes_the_same_from_layers(family: str, way: str) -> None:
    model = mixture(family)
    if model._can_set_experts_implementation():  # others have a loop of their own
        model.set_experts_implementation(way)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
    called: set[int] = set()
    with unchanged(model):
        before = dict(model.named_parameters())
        with separate_parts(model):
            split = _split(model)
            assert len(split) >= 2 * model.config.num_hidden_layers
            for weights in split:
                for layer in weights.layers():
                    layer.register_forward_pre_hook(lambda m, _: called.add(id(m)))
            with torch.no_grad():
                found = model(ids).logits
            assert len(called) > len(split)  # each weight, by several of its layers
            for weights in split:
                for layer in weights.layers():
                    layer._forward_pre_hooks.clear()
        after = dict(model.named_parameters())
        assert list(after) == list(before)  # in order, which optimizers rely on
        assert all(after[name] is before[name] for name in before)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_context_inside_another_leaves_the_layers_to_it() -> None:
    model = mixture("Mixtral")
    with separate_parts(model):
        count = len(_split(model))
        with separate_parts(model):
            assert len(_split(model)) == count
        assert len(_split(model)) == count
    assert not _split(model)


def test_an_error_inside_restores_the_model() -> None:
    model = mixture("Olmoe")
    with unchanged(model), pytest.raises(KeyError), separate_parts(model):
        raise KeyError


class Stack(nn.Module):
    """Matrices of one shape that are no experts, since all of them read every row."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,ni->no", self.parts, x)


def test_what_is_no_mixture_stays_as_it_is() -> None:
    net = nn.ModuleList([Stack(), nn.Conv1d(4, 4, 3), nn.Bilinear(4, 4, 3), nn.LSTM(4, 4)])
    with unchanged(net), separate_parts(net):
        assert not _split(net)


def test_on_the_meta_device_the_mark_of_the_layout_counts() -> None:
    for family, transposed in (("Mixtral", False), ("GptOss", True)):
        model = mixture(family).to("meta")
        with separate_parts(model):
            assert [weights.transposed for weights in _split(model)] == [transposed] * 4
        assert not _split(model)


def test_one_trial_serves_all_blocks_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[nn.Module] = []
    layout = experts._layout
    monkeypatch.setattr(experts, "_layout", lambda m, f: (tried.append(m), layout(m, f))[1])
    with separate_parts(mixture("Mixtral", num_hidden_layers=3)):
        pass
    assert len(tried) == 1


def test_hooks_of_the_mixture_do_not_see_the_trial() -> None:
    model, seen = mixture("Mixtral"), []
    layer = model.model.layers[0].mlp.experts
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    with separate_parts(model):
        assert _split(model)
    handle.remove()
    assert not seen


def test_a_factored_expert_stays_and_the_others_hold_their_own_memory() -> None:
    model = mixture("Mixtral")
    with separate_parts(model):
        first = _split(model)[0]
        first._modules["0"] = nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 96, False))
        expected = [layer.weight.clone() for layer in list(first.layers())[1:]]
    assert _split(model) == [first]
    for layer, weight in zip(list(first.layers())[1:], expected, strict=True):
        own: Any = layer.weight
        assert torch.equal(own, weight)
        assert own.untyped_storage().nbytes() == own.nbytes


def test_copies_are_joined_where_asked() -> None:
    model = mixture("GptOss")
    with separate_parts(model):
        copy = copied(model)
    keys = list(model.state_dict())
    assert list(copy.state_dict()) != keys
    join_parts(copy)
    assert list(copy.state_dict()) == keys
    for name, value in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value)


def test_a_decorated_function_meets_layers() -> None:
    count = parts_apart(lambda model: len(_split(model)))
    model = mixture("Mixtral")
    assert count(model) == 4
    assert not _split(model)
