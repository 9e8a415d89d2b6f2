"""effort: what every word does, on every family, and that it helps."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, Plan, Recovery
from lowrank.measure.eval import Reference
from lowrank.recover.blocks import predictions, usual_rate
from tests import zoo

QUICK = Recovery(block_steps=4, distill_steps=4)
FAMILIES = [zoo.llama, zoo.gpt2, zoo.opt, zoo.bert, zoo.t5]


def ids(rows: int = 10, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def data_for(make) -> list:
    if make is zoo.t5:
        return [{"input_ids": ids(seed=s), "labels": ids(seed=s + 9)} for s in range(2)]
    return [ids(seed=0), ids(seed=1)]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("make", FAMILIES)
def test_every_family_goes_through_every_stage(make, tmp_path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    before = values(model)
    lean, report = lowrank.compress(
        model, 0.6, data=data_for(make), effort=QUICK, copy=True, progress=False
    )
    after = values(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.achieved <= 0.6
    assert any("refitted in closed form" in note for note in report.notes)
    assert any(note.startswith("distilled") for note in report.notes)
    assert any("blocks improved" in note for note in report.notes)
    assert all(p.grad is None for p in lean.parameters())
    lowrank.save(lean, tmp_path)
    loaded = lowrank.from_pretrained(tmp_path).eval()
    batch = data_for(make)[0]
    with torch.no_grad():
        a, b = (
            lowrank.calibration.running.logits_of(lowrank.calibration.running.forward(m, batch))
            for m in (lean, loaded)
        )
    assert torch.equal(a, b)


def test_images_too() -> None:
    torch.manual_seed(0)
    model = zoo.vit().eval()
    images = torch.randn(12, 3, 16, 16)
    lean, report = lowrank.compress(
        model, 0.6, data=[images], effort=QUICK, copy=True, progress=False
    )
    assert any("blocks improved" in note for note in report.notes)
    assert bool(torch.isfinite(lean(images).logits).all())


def trained() -> tuple[nn.Module, torch.Tensor]:
    """A small model that has something to lose: it continues a repeating sequence."""
    torch.manual_seed(0)
    model = zoo.llama()
    rows = torch.stack([(torch.arange(16) * k + s) % 59 + 1 for k in (1, 2, 3) for s in range(20)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        logits = model(input_ids=rows).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), rows


def test_every_stage_is_worth_its_work() -> None:
    model, rows = trained()
    shuffled = rows[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
    used, held = shuffled[:44], [shuffled[44:]]
    found = {}
    stages = {
        "none": None,
        "closed": Recovery(),
        "blocks": Recovery(block_steps=60),
        "all": Recovery(block_steps=60, distill_steps=80),
    }
    for name, effort in stages.items():
        how = {"method": "whitened", "policy": "uniform", "storage": "pivoted", "effort": effort}
        lean, _ = lowrank.compress(model, 0.5, data=used, copy=True, progress=False, **how)
        found[name] = lowrank.kl(lean, model, held)
    assert found["closed"] < found["none"]
    assert found["blocks"] < found["closed"]
    assert found["all"] < found["blocks"]


def test_a_plan_carries_its_recovery_and_is_repeatable(tmp_path) -> None:
    torch.manual_seed(0)
    model = zoo.llama().eval()
    data = [ids(seed=0), ids(seed=1)]
    plan = lowrank.plan(model, 0.6, data=data, effort=QUICK, progress=False)
    plan = Plan.from_json(plan.to_json())
    models = [lowrank.apply(model, plan, data=data, copy=True, progress=False)[0] for _ in range(2)]
    first, second = map(values, models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_words() -> None:
    torch.manual_seed(0)
    model, data = zoo.llama().eval(), [ids(seed=0), ids(seed=1)]
    plan = lowrank.plan(model, 0.6, data=data, effort="fast", progress=False)
    assert plan.settings["method"] == "two-sided"
    assert plan.settings["policy"] == "lossaware"
    assert {e.storage for e in plan.entries if e.size} <= {"pivoted"}
    assert plan.settings["recovery"]["block_steps"] == 0
    own = lowrank.plan(
        model, 0.6, data=data, effort="fast", method="whitened", policy="uniform",
        storage="factors", progress=False,
    )  # fmt: skip
    assert (own.settings["method"], own.settings["policy"]) == ("whitened", "uniform")
    assert {e.storage for e in own.entries if e.size} == {"factors"}
    assert lowrank.EFFORTS["balanced"].recovery.block_steps > 0
    assert lowrank.EFFORTS["best"].recovery.distill_steps > 0


def test_the_rate_of_distillation_follows_predictions_and_distance() -> None:
    assert usual_rate(1.5, 4096, "muon") == usual_rate(1.0, 9999, "muon") == 0.008
    assert usual_rate(0.5, 1024, "muon") == pytest.approx(0.002)
    assert usual_rate(0.2, 1024, "muon") == usual_rate(0.0, 1024, "muon") == pytest.approx(0.0008)
    assert usual_rate(0.0, 1, "adamw") == usual_rate(2.0, 1, "adamw") == 0.01 / 64


def test_predictions_are_one_a_token_and_one_a_row_of_a_classifier() -> None:
    """Padding makes none."""
    torch.manual_seed(0)
    model, mask = zoo.llama().eval(), torch.ones(8, 16, dtype=torch.long)
    mask[:, 8:] = 0
    padded = {"input_ids": ids(8, 16), "attention_mask": mask}
    counts = [predictions(Reference(model, [batch]), 0) for batch in (ids(8, 16), padded)]
    counts.append(predictions(Reference(zoo.classifier().eval(), [ids(4, 16)]), 0))
    assert counts == [128, 64, 4]


def test_a_rate_that_is_given_is_taken() -> None:
    torch.manual_seed(0)
    net, x = zoo.mlp(16, 24, 8), torch.randn(64, 16)
    made = []
    for rate in (None, 0.008 * 0.2 / 16, 0.01):
        how = Recovery(refit=False, distill_steps=16, distill_rate=rate)
        lean, report = lowrank.compress(
            net, 0.6, data=list(x.split(16)), effort=how, method="whitened", policy="uniform",
            copy=True, progress=False,
        )  # fmt: skip
        (said,) = (note for note in report.notes if note.startswith("distilled"))
        assert "(step 0 of" not in said
        made.append(torch.cat([p.flatten() for p in lean.parameters()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_model_without_blocks_is_refitted_whole() -> None:
    torch.manual_seed(0)
    model = zoo.mlp(16, 24, 24, 8)
    x = torch.randn(64, 16)
    lean, report = lowrank.compress(
        model, 0.6, data=list(x.split(8)), effort=QUICK, copy=True, progress=False
    )
    assert any("refitted in closed form" in note for note in report.notes)
    assert bool(torch.isfinite(lean(x)).all())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"effort": "huge"}, "unknown effort"),
        ({"effort": "fast", "data": None}, "needs calibration data"),
        ({"effort": "fast", "data": lambda m: m(ids())}, "need batches|holds them"),
    ],
)
def test_refusals_leave_the_model_alone(how, said: str) -> None:
    model = zoo.llama().eval()
    before = values(model)
    with pytest.raises(LowrankError, match=said):
        lowrank.compress(model, 0.6, progress=False, **{"data": [ids()], **how})
    assert all(torch.equal(before[name], tensor) for name, tensor in values(model).items())


@pytest.mark.parametrize(
    "bad",
    [
        {"dense": 2}, {"dense": "all"}, {"dense": (0.5,)}, {"dense": (1.0, 1.5)},
        {"block_steps": -1}, {"rows": 0}, {"rows": "8"},
    ],
)  # fmt: skip
def test_a_recovery_is_checked(bad) -> None:
    with pytest.raises(LowrankError):
        Recovery(**bad)


def test_the_dense_share_falls_from_the_first_layer_to_the_last() -> None:
    falling = Recovery(dense=(0.8, 0.2))
    assert [falling.share(place) for place in (0, 0.5, 1)] == pytest.approx([0.8, 0.5, 0.2])
    assert Recovery(dense=0.3).share(0.7) == 0.3
    assert Recovery.from_json(json.loads(json.dumps(falling.to_json()))) == falling


def test_a_plans_recovery_is_checked() -> None:
    model = zoo.llama().eval()
    plan = lowrank.plan(model, 0.6, data=[ids()], effort="fast", progress=False)
    body = json.loads(plan.to_json())
    body["settings"]["recovery"] = {"epochs": 3}
    with pytest.raises(LowrankError, match="'recovery' in the plan may have"):
        lowrank.apply(model, Plan.from_json(json.dumps(body)), data=[ids()], progress=False)


def test_data_that_teach_nothing() -> None:
    """One token, one sequence repeated, all-zero inputs: singular Grams, a finite result."""
    torch.manual_seed(0)
    for data in ([ids(1, 1)], [ids(1, 6).repeat(8, 1)]):
        lean, _ = lowrank.compress(zoo.llama().eval(), 0.6, data=data, effort=QUICK, progress=False)
        assert bool(torch.isfinite(lean(input_ids=ids()).logits).all())
    model = zoo.mlp(8, 16, 16, 4)
    lean, _ = lowrank.compress(model, 0.6, data=[torch.zeros(9, 8)], effort=QUICK, progress=False)
    assert bool(torch.isfinite(lean(torch.zeros(3, 8))).all())
