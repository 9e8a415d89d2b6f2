"""data="default": who is calibrated on text of its own, who is never run, and what is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, Plan
from lowrank.methods import ASVD, SVD
from tests.zoo import example, make, refused, said, tokens, unchanged

OWN = "192 rows of 64 tokens that the model wrote itself, seed {}"


def never_run(model: nn.Module) -> Any:
    def forward(*_args: Any, **_given: Any) -> None:
        raise AssertionError("the model was run")

    model.forward = forward
    return model


def equal(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
    )


@pytest.mark.parametrize("how", [{"ratio": 0.6}, {"rank": 4}, {"rank_pattern": {"q_proj": 4}}])
def test_by_default_a_language_model_is_calibrated_on_its_own_text(how: dict[str, Any]) -> None:
    model = make("llama")
    model, report = lowrank.compress(model, **how, seed=3, progress=False)
    assert report.plan.method == "whitened"
    assert report.tokens == report.plan.settings["tokens"] == 192 * 64
    assert report.plan.settings["data"] == OWN.format(3)
    assert report.notes == (f"calibrated on {OWN.format(3)}",)
    assert report.notes[0] in str(report)
    assert lowrank.Report.from_json(report.to_json()).notes == report.notes


def test_self_is_what_calibrate_gives_for_it() -> None:
    model = make("llama")
    seen = lowrank.calibrate(model, "self", seed=1, progress=False)
    ways = (
        {"data": seen},
        {"data": "self"},
        {},
        {"method": "whitened"},
        {"data": "self", "seed": 2},
    )
    one, *others, last = (
        lowrank.compress(model, 0.5, copy=True, progress=False, **{"seed": 1, **way})[0]
        for way in ways
    )
    assert all(equal(one, other) for other in others)
    assert not equal(one, last)


@pytest.mark.parametrize("method", ["svd", "random", SVD()])
def test_a_method_that_needs_no_data_does_not_run_the_model(method: Any) -> None:
    _, report = lowrank.compress(never_run(make("llama")), 0.6, method=method, progress=False)
    assert (report.tokens, report.notes, report.plan.settings["data"]) == (0, (), "")


def test_none_never_runs_the_model() -> None:
    model = never_run(make("llama"))
    plan = lowrank.plan(model, 0.6, data=None)
    assert plan.method == "svd"
    assert lowrank.apply(model, plan)[1].tokens == 0


@pytest.mark.parametrize("kind", ["bert", "t5", "vit"])
def test_other_models_are_not_run(kind: str) -> None:
    model = never_run(make(kind))
    assert lowrank.plan(model, 0.6, progress=False).method == "svd"
    assert "needs calibration data (gram): pass data=…" in refused(model, 0.6, method="whitened")
    assert "cannot write its calibration data" in refused(model, 0.6, data="self")


def test_a_method_object_that_needs_data_gets_it() -> None:
    _, report = lowrank.compress(make("gpt2"), 0.6, method=ASVD(), progress=False)
    assert report.notes == (f"calibrated on {OWN.format(0)}",)


def test_given_data_is_not_called_self_written() -> None:
    model = make("llama")
    _, report = lowrank.compress(model, 0.6, data=tokens(8, 12), progress=False)
    assert (report.notes, report.plan.settings["data"]) == ((), "")


def test_a_plan_made_by_default_is_carried_out_on_the_same_text() -> None:
    model = make("llama")
    with unchanged(model):
        plan = lowrank.plan(model, 0.6, seed=4, progress=False)
    assert plan.settings["data"] == OWN.format(4)
    expected, _ = lowrank.compress(model, 0.6, seed=4, copy=True, progress=False)
    read = Plan.from_json(plan.to_json())
    for done, report in (
        lowrank.apply(model, read, copy=True, progress=False),
        lowrank.compress(model, read, copy=True, progress=False),
    ):
        assert equal(done, expected)
        assert report.notes == (f"calibrated on {OWN.format(4)}",)
        for site in report.sites:
            assert site.planned == pytest.approx(site.predicted, rel=1e-9)


def test_a_plan_of_given_data_asks_for_that_data() -> None:
    model = make("llama")
    plan = lowrank.plan(model, 0.6, data=[example("llama")], progress=False)
    longer = lowrank.calibrate(model, "self", length=16, progress=False)
    for made in (plan, lowrank.plan(model, 0.6, data=longer, progress=False)):
        with unchanged(model), pytest.raises(LowrankError) as caught:
            lowrank.apply(model, made, progress=False)
        assert "works from calibration data (gram): pass data=…" in said(caught)
    assert lowrank.apply(model, plan, data="self", progress=False)[1].tokens == 192 * 64
