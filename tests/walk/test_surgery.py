"""The surgeon: every place of a module, in the model, in a twin, for a moment, under wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lowrank
from lowrank import LowrankError
from lowrank.nn import LowRankLinear
from lowrank.types import Site
from lowrank.walk import layouts
from lowrank.walk.sites import find_sites
from lowrank.walk.surgery import (
    factored,
    in_copy,
    module_at,
    modules_of,
    put,
    replaced,
    swap,
    twin,
    unchanged_on_error,
    unwrapped,
)
from tests.walk.test_sites import tied
from tests.zoo import by_name, make, mlp


def compiled_lazily(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def factors(site: Site, rank: int = 3) -> LowRankLinear:
    out_features, in_features = site.shape
    down, up = torch.randn(rank, in_features), torch.randn(out_features, rank)
    return LowRankLinear.from_factors(down, up, layouts.bias(site.module))


def test_every_name_of_a_shared_module_is_swapped() -> None:
    inner = nn.ModuleDict({"fc": nn.Linear(4, 5)})
    model = nn.ModuleDict({"a": inner, "b": inner, "c": inner["fc"], "d": nn.Linear(4, 5)})
    site = find_sites(model)[0]
    new = factors(site)
    assert put(model, site, new) is model
    assert model["a"]["fc"] is model["b"]["fc"] is model["c"] is new
    assert isinstance(model["d"], nn.Linear)


def test_tied_layers_become_one_module() -> None:
    model = tied()
    (site,) = find_sites(model)
    new = factors(site)
    put(model, site, new)
    assert model.one is model.other is new
    assert torch.equal(model(torch.ones(1, 4)), new(new(torch.ones(1, 4))))


def test_the_root_is_returned_anew() -> None:
    model = nn.Linear(4, 5)
    (site,) = find_sites(model)
    new = factors(site)
    assert put(model, site, new) is new


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_flags_are_kept(training: bool, weight: bool, bias: bool) -> None:
    model = mlp(4, 5).train(training)
    model[0].weight.requires_grad_(weight)
    model[0].bias.requires_grad_(bias)
    (site,) = find_sites(model)
    new = factors(site).train(not training)
    put(model, site, new)
    assert {m.training for m in new.modules()} == {training}
    assert new.down.weight.requires_grad == new.up.weight.requires_grad == weight
    assert new.up.bias.requires_grad == bias


def test_the_layout_is_remembered() -> None:
    model = make("gpt2")
    found = by_name(find_sites(model))
    for name, layout in (("transformer.h.0.mlp.c_fc", "conv1d"), ("transformer.wte", "linear")):
        new = factors(found[name])
        put(model, found[name], new)
        assert model.get_submodule(name) is new
        assert new.layout == layout


# In a twin, for a moment, or not at all


def test_a_twin_costs_no_memory_and_is_changed_alone() -> None:
    model = mlp(4, 5, 6)
    other = twin(model)
    assert [p.data_ptr() for p in model.parameters()] == [p.data_ptr() for p in other.parameters()]
    site = find_sites(model)[0]
    assert put(other, site, factors(site)) is other
    assert isinstance(other[0], LowRankLinear)
    assert type(model[0]) is nn.Linear
    assert in_copy(site, other).module is other[0]


def test_a_module_is_replaced_for_a_moment_in_every_place() -> None:
    model = tied()
    (site,) = find_sites(model)
    one, other, new = model.one, model.other, factors(site)

    def fail() -> None:
        with replaced(model, site, new) as root:
            assert root is model
            assert model.one is model.other is new
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.one is one
    assert model.other is other
    (root_site,) = find_sites(nn.Linear(4, 5))
    with replaced(root_site.module, root_site, new) as root:
        assert root is new


def test_an_error_in_the_middle_leaves_everything_as_it_was() -> None:
    model = mlp(4, 5, 6)
    before = dict(model.named_modules())

    def fail() -> None:
        with unchanged_on_error(model):
            swap(model, {id(model[0]): nn.Linear(4, 5)})
            model[2].weight = nn.Parameter(torch.zeros(6, 5))
            model.register_buffer("more", torch.zeros(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert dict(model.named_modules()) == before
    assert bool(model[2].weight.any())
    assert "more" not in model._buffers


# Under wrappers

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": compiled_lazily,
    "DataParallel": nn.DataParallel,
    "both": lambda model: compiled_lazily(nn.DataParallel(model)),
    "activation checkpointing": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_take_no_part_in_names(wrapper: str) -> None:
    plain, wrapped = mlp(4, 5, 6), WRAPPERS[wrapper](mlp(4, 5, 6))
    assert {n for n, _ in modules_of(wrapped)} == {n for n, _ in modules_of(plain)}
    sites = find_sites(wrapped)
    assert [site.names for site in sites] == [site.names for site in find_sites(plain)]
    for site in sites:
        assert module_at(wrapped, site.name) is site.module
        assert put(wrapped, site, factors(site)) is wrapped
    assert list(factored(wrapped)) == ["0", "2"]
    inner = module_at(wrapped, "")
    assert [type(part) for part in inner] == [LowRankLinear, nn.ReLU, LowRankLinear]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_layers_that_are_wrapped_one_by_one(wrapper: str) -> None:
    model = mlp(4, 5, 6)
    model[2] = WRAPPERS[wrapper](model[2])
    sites = find_sites(model)
    assert [site.name for site in sites] == ["0", "2"]
    put(model, sites[1], new := factors(sites[1]))
    assert module_at(model, "2") is new
    assert model[2] is not new  # the wrapper stays, and runs the new layer
    inner = torch.randn(3, 5)
    assert torch.equal(model[2](inner), new(inner))
    with pytest.raises(LowrankError, match="has no module '3'"):
        module_at(model, "3")


def test_a_plan_of_the_model_fits_its_wrapper() -> None:
    model, x = mlp(16, 16, 16), torch.randn(3, 16)
    plan = lowrank.plan(model, 0.5)
    want, _ = lowrank.apply(model, plan, copy=True)
    wrapped, report = lowrank.apply(nn.DataParallel(model), plan)
    assert isinstance(wrapped, nn.DataParallel)
    assert [site.name for site in report.sites] == ["0", "2"]
    assert torch.equal(wrapped(x), want(x))


def test_the_model_inside_of_several_wrappers() -> None:
    model = mlp(4, 5)
    assert unwrapped(compiled_lazily(nn.DataParallel(model))) is model
    assert unwrapped(model) is model


def test_a_layer_wrapped_by_itself_is_saved_by_its_plain_name(tmp_path: Any) -> None:
    model, x = mlp(16, 16, 8), torch.randn(3, 16)
    model[0] = compiled_lazily(model[0])
    model, _ = lowrank.compress(model, 0.5)
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, mlp(16, 16, 8))
    assert torch.equal(again(x), model(x))
    compiled = mlp(16, 16, 8)
    compiled[0] = compiled_lazily(compiled[0])
    assert torch.equal(lowrank.load(tmp_path, compiled)(x), again(x))
