"""Plans are frozen, editable, and survive JSON; nonsense in them is told."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, Plan
from lowrank.plans import plan as plan_module
from lowrank.tables import Rows
from tests.test_tables import rendered
from tests.zoo import calibration, make, mlp, said, tokens

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Of a tiny llama, with every kind of entry: factored, excluded, the head."""
    model = make("llama")
    return lowrank.plan(
        model, 0.6, data=calibration(model, tokens(4, 16)), exclude_modules=["k_proj"],
        rank_pattern={"layers.1.mlp.up_proj": 5}, seed=3,
    )  # fmt: skip


def edited(plan: Plan, change: Callable[[Any], object]) -> str:
    """The plan's JSON after a change to the parsed body."""
    body = json.loads(plan.to_json())
    change(body)
    return json.dumps(body)


def test_a_plan_tells_how_it_was_made(plan: Plan) -> None:
    assert plan.asked == {
        "ratio": 0.6, "rank": None, "rank_pattern": {"layers.1.mlp.up_proj": 5},
        "of": "targets", "unit": "params",
    }  # fmt: skip
    made = dict(plan.settings)
    assert made.pop("versions")["torch"] == torch.__version__
    assert made == {
        "method": "whitened", "policy": "uniform", "align": None, "prefer": "size",
        "on_missing": "dense", "seed": 3, "tokens": 64, "data": "", "storage": "factors",
        "recovery": None, "called": ["whitened"],
    }  # fmt: skip
    assert (plan.method, plan.seed, plan.unit) == ("whitened", 3, "params")


def test_shares_are_counted_over_the_targets_and_the_model(plan: Plan) -> None:
    model = make("llama")
    targets = [entry for entry in plan.entries if entry.target]
    assert len(targets) == 12  # 14 without k_proj; the head is none
    dense = sum(math.prod(entry.shape) for entry in targets)
    now = sum(e.size[0] * sum(e.shape) if e.size else math.prod(e.shape) for e in targets)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert plan.kept() == pytest.approx(now / dense)
    assert plan.kept("bytes") == pytest.approx(now / dense)
    assert plan.kept_of_model() == pytest.approx((whole - dense + now) / whole)
    assert plan.model.params == whole
    assert plan.model.bytes == 4 * whole


def test_a_plan_is_frozen(plan: Plan) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.entries = ()  # type: ignore[misc]


# Editing


def test_edit_makes_a_new_plan(plan: Plan) -> None:
    before = plan.to_json()
    other = plan.edit({Q: 3, "model.layers.0.self_attn.o_proj": None})
    assert plan.to_json() == before
    by_name = {entry.name: entry for entry in other.entries}
    assert by_name[Q].size == (3,)
    assert by_name[Q].error is None
    assert by_name["model.layers.0.self_attn.o_proj"].size is None
    assert other.settings["edited"] is True
    changed = [e.name for e, old in zip(other.entries, plan.entries, strict=True) if e != old]
    assert changed == [Q, "model.layers.0.self_attn.o_proj"]


def test_a_dense_site_can_be_given_a_rank(plan: Plan) -> None:
    (entry,) = [e for e in plan.edit({"lm_head": 4}).entries if e.name == "lm_head"]
    assert (entry.size, entry.method, entry.reason) == ((4,), "whitened", "")
    assert not entry.target  # the ratio was of other sites


def test_any_name_of_a_shared_site_edits_it() -> None:
    layer = nn.Linear(16, 16)
    plan = lowrank.plan(nn.ModuleDict({"a": layer, "b": layer}), 0.5)
    assert plan.edit({"b": 2}).entries[0].size == (2,)


def test_edits_that_cannot_be(plan: Plan) -> None:
    with pytest.raises(LowrankError, match=r"no site 'q' in the plan; it has model.embed_tokens"):
        plan.edit({"q": 3})
    with pytest.raises(LowrankError, match=r"rank must be in \[1, 32\] for model.layers.0.*q_proj"):
        plan.edit({Q: 16})


# JSON


def test_json_round_trip_is_exact(plan: Plan, tmp_path: Path) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    again = plan.edit({Q: 3})
    assert Plan.from_json(again.to_json()) == again


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"rank": 0.9},
        {"rank_pattern": {"0": 3}},
        {"ratio": 0.5, "unit": "bytes", "of": "model", "policy": "spectrum", "align": 2},
    ],
    ids=str,
)
def test_every_kind_of_plan_round_trips(options: dict[str, Any]) -> None:
    plan = lowrank.plan(mlp(16, 24, 1), **options)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_made_by_hand_round_trips() -> None:
    plan = Plan((), lowrank.plan(mlp(16, 16), 0.5).model)
    assert Plan.from_json(plan.to_json()) == plan
    assert (plan.unit, plan.method, plan.seed, plan.kept()) == ("params", "svd", 0, 0.0)
    assert plan.asked_text() == "a plan"


def test_a_size_edited_in_the_text_counts(plan: Plan) -> None:
    index = next(i for i, entry in enumerate(plan.entries) if entry.name == Q)
    text = edited(plan, lambda body: body["entries"][index].update(size=[3]))
    got, expected = Plan.from_json(text), plan.edit({Q: 3})
    assert got.entries == expected.entries
    assert got.kept() == expected.kept() != plan.kept()


NONSENSE: dict[str, tuple[Callable[[Any], object], str]] = {
    "other file": (lambda b: b.pop("format"), "not a lowrank plan"),
    "version": (lambda b: b.update(version=9), "plan version 9 is unknown; this library reads 1"),
    "no entries": (lambda b: b.pop("entries"), "the plan: missing field 'entries'"),
    "spare": (lambda b: b.update(sites=["x"]), "unknown field 'sites'"),
    "entries": (lambda b: b.update(entries={}), "entries must be a list, got {}"),
    "entry": (lambda b: b["entries"].append(None), "must be an object, got None"),
    "twice": (lambda b: b["entries"].append(b["entries"][0]), "in more than one entry"),
    "model": (lambda b: b.update(model=5), "model must be params, bytes and macs"),
    "asked": (lambda b: b.update(asked=[]), "asked must be an object"),
    "ratio": (lambda b: b["asked"].update(ratio="0.6"), "'asked' in the plan: ratio must be"),
    "unit": (lambda b: b["asked"].update(unit="kB"), "one of params, bytes, macs, got 'kB'"),
    "method": (lambda b: b["settings"].update(method=3), "method must be text"),
    "seed": (lambda b: b["settings"].update(seed="x"), "seed must be an integer"),
    "rank": (lambda b: b["entries"][0].update(size=[999]), "rank must be in [1, 32]"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_told(plan: Plan, name: str) -> None:
    change, words = NONSENSE[name]
    with pytest.raises(LowrankError) as caught:
        Plan.from_json(edited(plan, change))
    assert words in said(caught)


@pytest.mark.parametrize("text", ["", "{", "nonsense", '{"format": "lowrank-plan"'])
def test_what_is_not_json(text: str) -> None:
    with pytest.raises(LowrankError, match="the plan is not JSON"):
        Plan.from_json(text)


@pytest.mark.parametrize("text", ["[]", "5", "null", '"lowrank-plan"', "{}"])
def test_json_of_something_else(text: str) -> None:
    with pytest.raises(LowrankError, match="not a lowrank plan"):
        Plan.from_json(text)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(LowrankError, match="no plan at"):
            Plan.load(path)


# Printing


def test_text_and_rich_show_every_site(plan: Plan) -> None:
    rows: Rows = plan.rows()
    assert len(rows) == len(plan.entries) == 16
    for text in (str(plan), rendered(plan)):
        for entry in plan.entries:
            assert entry.name in text
        assert "ratio 0.6" in text
        assert "in exclude_modules" in text
    assert f"keeps {plan.kept():.4f} of the targets' params" in str(plan)


def test_patterns_in_the_title_are_no_markup() -> None:
    plan = lowrank.plan(mlp(16, 16, 16), rank_pattern={"[0-9]": 4, "[a-z]*2": 3})
    assert "{'[0-9]': 4, '[a-z]*2': 3}" in rendered(plan)


def test_versions_of_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def version(package: str) -> str:
        if package == "lowrank":
            raise PackageNotFoundError
        return f"{package} 1"

    monkeypatch.setattr(plan_module, "installed", version)
    monkeypatch.setitem(sys.modules, "transformers", torch)  # whatever it is
    assert plan_module.versions() == {
        "python": platform.python_version(), "torch": torch.__version__,
        "lowrank": "source", "transformers": "transformers 1",
    }  # fmt: skip
    monkeypatch.delitem(sys.modules, "transformers")
    assert "transformers" not in plan_module.versions()  # it is not imported to find out
