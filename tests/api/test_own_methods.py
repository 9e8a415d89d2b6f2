"""Methods of one's own, and failures in the middle: the model is never left half changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, Plan
from lowrank.api import applying
from lowrank.methods import SVD
from lowrank.nn import LowRankLinear
from lowrank.types import Cost, Curve, Option, Site, Statistics
from lowrank.walk import layouts
from tests.zoo import llama, make, mlp, unchanged, weights


@dataclass(frozen=True)
class Halves:
    """Keeps the first columns of the weight: two tensors and no factored module of ours."""

    name: str = "halves"
    fail_at: int | None = None
    gives: Any = None
    kinds = frozenset({"linear"})
    needs = frozenset[str]()

    def curve(self, site: Site, stats: Statistics) -> Curve:
        out_features, in_features = site.shape
        weight = layouts.matrix(site.module).detach().double()
        total = float(weight.square().sum())
        numbers = out_features * (in_features // 2)
        error = float(weight[:, in_features // 2 :].square().sum())
        half = Option(
            self.name, (in_features // 2,), "own", Cost(numbers, 4 * numbers, numbers), error
        )
        dense = Option("dense", None, "dense", site.cost, 0.0)
        return Curve(site.names, (half, dense), total, None, "weight", False)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        if self.fail_at is not None and layouts.matrix(module).shape[0] == self.fail_at:
            raise RuntimeError("the disk is full")
        return Half(module, option.size[0]) if self.gives is None else self.gives


class Half(nn.Module):
    def __init__(self, module: Any, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(module.weight.detach()[:, :width].clone())
        self.bias = nn.Parameter(module.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x[..., : self.weight.shape[1]], self.weight, self.bias)


def test_a_method_may_be_any_object() -> None:
    model = mlp(24, 40, 16)
    dense = weights(model)
    model, report = lowrank.compress(model, 0.5, target_modules="all", method=Halves())
    assert torch.equal(model[0].weight, dense["0"][:, :12])
    assert report.plan.method == "halves"
    assert report.achieved == 0.5  # counted on tensors that the library knows nothing of
    assert report.sites[0].measured is None  # and cannot measure
    assert report.sites[0].predicted == report.plan.entries[0].error
    assert model(torch.randn(3, 24)).shape == (3, 16)


def test_an_object_is_used_though_the_registry_knows_its_name() -> None:
    model, _ = lowrank.compress(
        mlp(24, 40, 16), 0.5, target_modules="all", method=Halves(name="svd")
    )
    assert isinstance(model[0], Half)


def test_a_plan_of_an_object_needs_the_object() -> None:
    model = mlp(24, 40, 16)
    plan = Plan.from_json(lowrank.plan(model, 0.5, target_modules="all", method=Halves()).to_json())
    with unchanged(model), pytest.raises(LowrankError, match=r"'halves' is none of svd.*method=…"):
        lowrank.apply(model, plan)
    lowrank.apply(model, plan, method=Halves(), copy=True)
    model, _ = lowrank.compress(model, plan, method=Halves())
    assert isinstance(model[0], Half)


def test_a_mixed_plan_uses_both() -> None:
    model = mlp(24, 40, 16)
    plan = lowrank.plan(model, 0.5, target_modules="all", method=Halves())
    svd = lowrank.plan(model, 0.5, target_modules="all").entries[1]
    model, _ = lowrank.apply(model, replace(plan, entries=(plan.entries[0], svd)), method=Halves())
    assert isinstance(model[0], Half)
    assert isinstance(model[2], LowRankLinear)


@pytest.mark.parametrize("copy_", [False, True])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(copy_: bool) -> None:
    model = mlp(24, 40, 16).train()
    with unchanged(model), pytest.raises(RuntimeError, match="the disk is full"):
        lowrank.compress(model, 0.5, target_modules="all", method=Halves(fail_at=16), copy=copy_)


@pytest.mark.parametrize("stage", ["put", "attach"])
def test_a_failure_while_it_is_put_in_place_is_undone(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    calls = []

    def fail(*args: Any) -> Any:
        calls.append(1)
        if stage == "attach" or len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    where = applying.io if stage == "attach" else applying
    real = getattr(where, stage)
    monkeypatch.setattr(where, stage, fail)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        lowrank.compress(model, 0.6, data=None)


def test_a_declared_tie_that_was_undone_is_refused_and_undone() -> None:
    """The config ties the head to the embedding; in memory they are two tensors."""
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with unchanged(model), pytest.raises(LowrankError, match="tie_word_embeddings=False"):
        lowrank.compress(model, 0.5, data=None, target_modules=["lm_head", "q_proj"])


@pytest.mark.parametrize("bad", [torch.ones(2), "module"], ids=["tensor", "text"])
def test_a_method_that_gives_no_module(bad: Any) -> None:
    model = mlp(24, 40, 16)
    with unchanged(model), pytest.raises(LowrankError, match=r"0: halves must return an nn.Module"):
        lowrank.compress(model, 0.5, target_modules="all", method=Halves(gives=bad))


def test_one_decomposition_per_site_and_verb() -> None:
    """compress takes predicted errors from the plan's own curves."""

    @dataclass(frozen=True)
    class Counted(SVD):
        def curve(self, site: Site, stats: Statistics) -> Curve:
            curves.append(site.name)
            return super().curve(site, stats)

    curves: list[str] = []
    lowrank.compress(mlp(24, 40, 16), 0.5, target_modules="all", method=Counted())
    assert curves == ["0", "2"]
