"""Three errors against numpy, and figures counted on what is stored."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import Plan, Report
from lowrank.nn import LowRankLinear
from lowrank.walk import layouts
from tests.test_tables import rendered
from tests.zoo import inputs_of, make, mlp, numbers, tokens, weights

X = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))


# Errors: planned, predicted, measured


def test_measured_errors_are_those_of_the_outputs() -> None:
    """Mean squared difference of the layer's output per token, from captured inputs in numpy."""
    model = make("llama")
    dense, data = weights(model), tokens(6, 32)
    names = [name for name in dense if name != "lm_head"]
    inputs = inputs_of(model, names, lambda: model(data))
    _, report = lowrank.compress(model, 0.5, data=data, progress=False)
    assert len(report.sites) == len(names)
    for site in report.sites:
        new = model.get_submodule(site.name)
        product = new.up.weight.detach().double() @ new.down.weight.detach().double()
        difference = dense[site.name].double().numpy() - product.numpy()
        rows = inputs[site.name]
        expected = ((rows @ difference.T) ** 2).sum() / len(rows)
        total = ((rows @ dense[site.name].double().numpy().T) ** 2).sum() / len(rows)
        assert site.measured == pytest.approx(expected, rel=1e-5)
        assert site.total == pytest.approx(total, rel=1e-5)
        assert site.planned == site.predicted == pytest.approx(site.measured, rel=1e-4)
        assert site.norm == "output"


def test_without_data_errors_are_those_of_the_weights() -> None:
    model = mlp(24, 40, 24)
    dense = weights(model)
    _, report = lowrank.compress(model, 0.5)
    for site in report.sites:
        new = model.get_submodule(site.name)
        product = (new.up.weight @ new.down.weight).detach().numpy()
        expected = ((dense[site.name].numpy() - product) ** 2).sum()
        assert site.planned == site.predicted
        assert site.planned == pytest.approx(site.measured, rel=1e-4)
        assert site.measured == pytest.approx(expected, rel=1e-4)


def test_rounding_is_measured_too() -> None:
    model = mlp(24, 40, 24).bfloat16()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(40, 2) @ torch.randn(2, 24))
    _, report = lowrank.compress(model, rank=5)
    (first, _) = report.sites
    assert first.measured > first.planned + 1e-6 * first.total


def test_on_other_data_planned_and_predicted_differ() -> None:
    model = mlp(24, 40, 24)
    plan = lowrank.plan(model, 0.5, data=X, progress=False)
    _, report = lowrank.apply(model, plan, data=X * torch.linspace(0.1, 3, 24), progress=False)
    for site, entry in zip(report.sites, plan.entries, strict=True):
        assert site.planned == entry.error
        assert abs(site.predicted - site.planned) > 0.05 * site.planned
        assert site.predicted == pytest.approx(site.measured, rel=1e-4)


def test_an_edited_plan_has_no_planned_error_but_the_others() -> None:
    model = make("llama")
    plan = lowrank.plan(model, 0.5, data=None, exclude_modules=["o_proj"]).edit(
        {"model.layers.0.self_attn.q_proj": 3, "model.layers.0.self_attn.o_proj": 4}
    )
    _, report = lowrank.apply(model, plan)
    edited = {s.name: s for s in report.sites if s.planned is None}
    assert len(edited) == 2
    for site in edited.values():
        assert site.predicted == pytest.approx(site.measured, rel=1e-4)
        assert site.norm == "weight"
        rank = model.get_submodule(site.name).rank
        assert rank == (3 if "q_proj" in site.name else 4)


def test_a_planned_error_in_another_norm_is_not_compared() -> None:
    model = mlp(24, 40, 24)
    plan = lowrank.plan(model, 0.5, data=X, progress=False)
    other = replace(plan, entries=tuple(replace(e, method="svd") for e in plan.entries))
    _, report = lowrank.apply(model, other)
    for site in report.sites:
        assert site.planned is None
        assert site.norm == "weight"
        assert site.predicted == pytest.approx(site.measured, rel=1e-4)


# The bookkeeping


@pytest.mark.parametrize("unit", ["params", "bytes", "macs"])
@pytest.mark.parametrize("of", ["targets", "model"])
def test_achieved_is_counted_on_stored_tensors(unit: Any, of: Any) -> None:
    model = make("llama")
    whole = sum(parameter.numel() for parameter in model.parameters())
    dense, head = numbers(model), model.lm_head.weight.numel()
    model, report = lowrank.compress(model, 0.7, data=None, unit=unit, of=of, align=1)
    now = sum(parameter.numel() for parameter in model.parameters())
    kept = (numbers(model) - head) / (dense - head)
    assert whole - now == dense - numbers(model) > 0
    assert report.achieved == pytest.approx(kept, abs=1e-12)
    base = dense if unit == "macs" else whole  # macs are those of linear layers
    assert report.achieved_of_model == pytest.approx(1 - (whole - now) / base, abs=1e-12)
    assert report.achieved == pytest.approx(report.plan.kept())
    assert report.achieved_of_model == pytest.approx(report.plan.kept_of_model())
    assert (report.params_before, report.params_after) == (whole, now)
    assert (report.bytes_before, report.bytes_after) == (4 * whole, 4 * now)
    asked = report.achieved if of == "targets" else report.achieved_of_model
    assert 0.65 < asked <= 0.7
    assert report.asked == 0.7


def test_a_tied_weight_is_counted_and_factored_once() -> None:
    layer = nn.Linear(16, 16, bias=False)
    other = nn.Linear(16, 16, bias=False)
    other.weight = layer.weight
    model = nn.Sequential(layer, nn.ReLU(), other, nn.Linear(16, 16, bias=False))
    model, report = lowrank.compress(model, 0.5, align=1)
    assert report.params_before == 512
    assert model[0] is model[2]
    assert isinstance(model[0], LowRankLinear)
    assert report.params_after == sum(p.numel() for p in model.parameters()) == 256
    assert report.achieved == 0.5


def test_a_report_holds_what_repeats_it() -> None:
    model = make("llama")
    _, report = lowrank.compress(model, 0.6, data=tokens(4, 16), seed=5, progress=False)
    assert report.tokens == 64
    assert report.seed == 5
    assert report.versions["torch"] == torch.__version__
    assert {"python", "lowrank", "transformers"} <= report.versions.keys()
    assert report.seconds > sum(site.seconds for site in report.sites) > 0
    assert all(0 <= entry.rcond <= 1 for entry in report.plan.entries if entry.size)
    body = json.loads(report.to_json())
    assert Plan.from_json(json.dumps(body["plan"])) == report.plan
    assert body["achieved"] == report.achieved
    assert len(body["sites"]) == 14


def test_seconds_include_the_calibration() -> None:
    def slow(model: nn.Module) -> None:
        time.sleep(0.05)
        model(X)

    for verb in (
        lambda: lowrank.compress(mlp(24, 16), 0.5, data=slow, progress=False),
        lambda: lowrank.apply(mlp(24, 16), lowrank.plan(mlp(24, 16), 0.5), data=slow),
    ):
        assert verb()[1].seconds > 0.1  # it is run to observe, and to gather


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_report_prints_every_site(kind: str) -> None:
    model = make(kind)
    dense = [n for n, m in model.named_modules() if layouts.kind(m)]
    _, report = lowrank.compress(model, 0.6, data=None)
    for text in (str(report), rendered(report)):
        for name in dense:
            assert name in text
        for words in (
            "asked 0.6 of the targets",
            f"achieved {report.achieved:.4f} of the targets' params",
            f"{report.achieved_of_model:.4f} of the model's",
            f"parameters {report.params_before:,} -> {report.params_after:,}",
            f"bytes {report.bytes_before:,} -> {report.bytes_after:,}",
            "factored by svd, ranks by uniform, 0 calibration tokens, seed 0",
        ):
            assert words in text
    assert f"{len(report.sites)} of {len(report.plan.entries)} layers" in str(report)
    if kind != "llama":
        assert "(tied: " in str(report)
    row = next(row for row in report.rows() if row["measured"])
    assert row["measured"] == row["error"] != ""


def test_a_report_is_frozen() -> None:
    _, report = lowrank.compress(mlp(24, 16), 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.achieved = 1.0  # type: ignore[misc]
    assert copy.deepcopy(report).plan == report.plan


def test_a_report_is_read_back() -> None:
    model = make("llama")
    _, report = lowrank.compress(model, 0.5, data=tokens(6, 32), progress=False)
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sites", [3], "a layer of the report must be an object"),
        ("sites", [{"name": "a"}], "a layer of the report: missing field"),
        ("achieved", -1, "achieved must be a number >= 0"),
        ("achieved", None, "achieved must be a number >= 0"),
        ("bytes_after", 1.5, "bytes_after must be an integer >= 0"),
        ("plan", [], "plan must be an object"),
        ("plan", {}, "not a lowrank plan"),
        ("notes", [1], "notes must be a list of texts"),
        ("version", 2, "report version 2 is unknown"),
        ("more", 1, "unknown field 'more'"),
    ],
)
def test_an_edited_report_is_checked(key: str, value: object, words: str) -> None:
    _, report = lowrank.compress(mlp(24, 16), 0.5)
    body = {**json.loads(report.to_json()), key: value}
    with pytest.raises(lowrank.LowrankError, match=words):
        Report.from_json(json.dumps(body))


def test_as_a_table_of_pandas() -> None:
    pytest.importorskip("pandas", reason="pandas is no dependency")
    _, report = lowrank.compress(make("llama"), 0.6, data=None, method="svd", progress=False)
    table = report.to_pandas()
    assert list(table["site"]) == [entry.title for entry in report.plan.entries]
    factored = table[table["storage"] == "factors"]
    assert (factored["params"] < factored["dense params"]).all()
    assert factored["measured error"].notna().all()
    dense = table[table["storage"] == "dense"]
    assert (dense["params"] == dense["dense params"]).all()
    saved = int((table["dense params"] - table["params"]).sum())
    assert saved == report.params_before - report.params_after
