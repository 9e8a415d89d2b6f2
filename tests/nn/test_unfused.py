"""What all modules have in common that hold fused weights as layers: in, and back as before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lowrank.nn.splits import split_module
from lowrank.nn.unfused import Unfused, fuse

MODULES = {
    "attention": lambda: nn.MultiheadAttention(12, 4),
    "attention, other widths": lambda: nn.MultiheadAttention(12, 4, kdim=10, vdim=14),
    "lstm": lambda: nn.LSTM(6, 8, 2, bidirectional=True, proj_size=4),
    "gru": lambda: nn.GRU(6, 8, bias=False),
    "rnn": lambda: nn.RNN(6, 8),
    "grouped": lambda: nn.Conv2d(16, 24, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(16, 24, 3, groups=2),
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[request.param]()


def test_split_and_whole_again_it_holds_the_very_parameters(module: nn.Module) -> None:
    cls, before = type(module), list(module.named_parameters())
    names = split_module(module)
    assert isinstance(module, Unfused)
    assert isinstance(module, cls)  # whoever asks for the class is answered as before
    assert all(module._parameters[name] is None for name in names)
    for name, held in names.items():  # who reads them is given what they would be
        assert torch.equal(getattr(module, name), held)
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for _, p in before)
    assert module.is_dense
    fuse(module, names)
    after = list(module.named_parameters())
    assert type(module) is cls
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(one is other for (_, one), (_, other) in zip(after, before, strict=True))


def test_layers_are_views_and_changes_of_them_come_back(module: nn.Module) -> None:
    held = {key: value.clone() for key, value in module.state_dict().items()}
    names = split_module(module)
    assert isinstance(module, Unfused)
    shared = {p.untyped_storage().data_ptr() for p in names.values()}
    inner = [layer for key, layer in module.layers().items() if key != "out_proj"]
    assert all(layer.weight.untyped_storage().data_ptr() in shared for layer in inner)
    for layer in inner:
        layer.weight = nn.Parameter(2 * layer.weight.detach())
    fuse(module, names)
    for key, value in module.state_dict().items():
        doubled = "weight" in key and key != "out_proj.weight"
        assert torch.equal(value, held[key] * (2 if doubled else 1)), key


def test_half_precision_copies_and_pickles(module: nn.Module) -> None:
    split_module(module)
    small = copy.deepcopy(module).to(torch.bfloat16)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert isinstance(small, Unfused)
    fuse(small, {})
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is type(module)
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_frozen_parameters_give_frozen_layers(module: nn.Module) -> None:
    module.requires_grad_(False)
    names = split_module(module)
    assert isinstance(module, Unfused)
    assert not any(p.requires_grad for p in module.parameters())
    fuse(module, names)
    assert not any(p.requires_grad for p in module.parameters())


def test_a_layer_that_is_hooked_or_replaced_is_not_dense(module: nn.Module) -> None:
    split_module(module)
    assert isinstance(module, Unfused)
    key, layer = next(iter(module.layers().items()))
    handle = layer.register_forward_hook(lambda *_: None)
    assert not module.is_dense
    handle.remove()
    assert module.is_dense
    module._modules[key] = nn.Identity()
    assert not module.is_dense


def test_initialising_it_leaves_its_layers_alone(module: nn.Module) -> None:
    split_module(module)
    held = {name: value.clone() for name, value in module.state_dict().items()}
    for name in ("reset_parameters", "_reset_parameters"):  # transformers calls torch's own
        if hasattr(type(module), name):
            getattr(module, name)()
    for name, value in module.state_dict().items():
        assert torch.equal(value, held[name])
