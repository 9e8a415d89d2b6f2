"""Groups with one basis beside pivoted storage, recovery, policies that probe, and own text."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import lowrank
from lowrank import LowrankError
from lowrank.measure.eval import kl
from lowrank.methods import BasisSharing
from lowrank.policies import policy_of
from tests.zoo import calibration, make, refused, tokens, unchanged


@pytest.mark.parametrize("method", ["basis-sharing", BasisSharing()])
@pytest.mark.parametrize(
    ("option", "said"),
    [({"storage": "pivoted"}, "pivots one layer's own factors"),
     ({"effort": "fast"}, "effort='fast' refits layers one by one")],
)  # fmt: skip
def test_what_takes_layers_one_by_one_is_refused(method: Any, option: Any, said: str) -> None:
    told = refused(make("llama"), 0.6, method=method, data=[tokens()], **option)
    assert said in told
    assert "gives several layers one basis: drop one of the two" in told


def test_a_plan_that_was_given_a_recovery_is_refused() -> None:
    plan = lowrank.plan(make("llama"), 0.6, method="basis-sharing", data=[tokens()], progress=False)
    body = json.loads(plan.to_json())
    body["settings"]["recovery"] = {"dense": 0.5}
    edited, model = lowrank.Plan.from_json(json.dumps(body)), make("llama")
    with unchanged(model), pytest.raises(LowrankError, match="recovery refits layers one by one"):
        lowrank.apply(model, edited, data=[tokens()], progress=False)


def test_a_policy_probes_the_groups_as_they_will_be() -> None:
    heard = []

    def uniform(curves: Any, budget: Any, probe: Any) -> Any:
        found = policy_of("uniform")(curves, budget, None)
        heard.append(probe(found))
        return found

    rows, model = tokens(6), make("llama")
    seen = calibration(model, [rows[:4]], hold_out=0.25)
    assert seen.held_out
    new, report = lowrank.compress(
        model, 0.6, method="basis-sharing", policy=uniform, data=seen, align=1, copy=True,
        progress=False,
    )  # fmt: skip
    assert heard == [pytest.approx(kl(new, model, seen.held_out), rel=1e-9)]
    assert heard[0] > 0
    assert any(entry.group for entry in report.plan.entries)


def test_without_data_the_model_writes_it() -> None:
    plan = lowrank.plan(make("llama"), 0.6, method="basis-sharing", progress=False)
    assert plan.settings["data"]
    assert any(entry.group for entry in plan.entries)
    one, report = lowrank.apply(make("llama"), plan, progress=False)
    two, _ = lowrank.compress(make("llama"), 0.6, method="basis-sharing", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(plan.settings["data"] in note for note in report.notes)


def test_a_site_alone_that_is_given_a_rank_takes_the_storage_of_the_plan() -> None:
    plan = lowrank.plan(
        make("llama"), rank_pattern={"q_proj": 8}, method="basis-sharing", data=[tokens()],
        progress=False,
    )  # fmt: skip
    name = "model.layers.0.mlp.down_proj"
    entry = next(entry for entry in plan.edit({name: 4}).entries if entry.name == name)
    assert (entry.method, entry.storage) == ("whitened", "factors")
