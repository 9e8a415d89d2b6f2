"""Layers that read one tensor get one basis: from calibration to files, and back to dense."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.calibration.running import forward
from lowrank.nn import LowRankLinear, SharedLowRankLinear
from lowrank.policies import POLICIES
from tests.zoo import Custom, calibration, example, make, refused, tokens, unchanged

ATTENTION = "model.layers.0.self_attn.{}_proj"
MLP = "model.layers.1.mlp.{}_proj"


def compressed(kind: str = "llama", ratio: float = 0.6, **options: Any) -> tuple[Any, Any]:
    given = {"method": "basis-sharing", "data": [example(kind)], **options}
    return lowrank.compress(make(kind), ratio, **given, progress=False)


def logits(model: nn.Module, kind: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return forward(model, example(kind)).logits


def parallel() -> Custom:
    """Three layers on one input, called in another order than they stand in."""
    torch.manual_seed(3)
    parts = {"a": nn.Linear(12, 10), "b": nn.Linear(12, 6, bias=False), "c": nn.Linear(12, 8)}
    return Custom(lambda self, x: torch.cat([self.c(x), self.a(x), self.b(x)], -1), **parts)


X = torch.randn(40, 12, generator=torch.Generator().manual_seed(4))


def shared(model: nn.Module, **options: Any) -> tuple[Any, Any]:
    given = {"ratio": 0.7, "method": "basis-sharing", "data": [X], **options}
    return lowrank.compress(model, **given, progress=False)


def test_those_that_read_one_tensor_share_and_the_others_do_not() -> None:
    model, report = compressed()
    for names, template in (("qkv", ATTENTION), (("gate", "up"), MLP)):
        first, *others = (model.get_submodule(template.format(name)) for name in names)
        assert type(first) is LowRankLinear
        assert all(type(m) is SharedLowRankLinear and m.owner is first for m in others)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert type(model.get_submodule(f"model.layers.0.{name}")) is LowRankLinear
    entries = {entry.name: entry for entry in report.plan.entries}
    owner = ATTENTION.format("q")
    assert [entries[ATTENTION.format(n)].group for n in "qkv"] == [owner] * 3
    assert entries["model.layers.0.self_attn.o_proj"].method == "whitened"
    assert entries["model.layers.0.self_attn.o_proj"].group == ""
    assert (report.plan.method, report.plan.single) == ("basis-sharing", "whitened")


def test_costs_add_up_to_what_is_stored() -> None:
    model, report = compressed(unit="params")
    rank = model.get_submodule(ATTENTION.format("q")).rank
    costs = {entry.name: entry.cost.params for entry in report.plan.entries}
    found = [costs[ATTENTION.format(name)] for name in "qkv"]
    assert found == [rank * (32 + 32), rank * 16, rank * 16]
    assert report.achieved == pytest.approx(report.plan.kept(), abs=1e-12)
    assert report.achieved <= 0.6
    saved = report.params_before - report.params_after
    assert report.params_after == sum(p.numel() for p in model.parameters())
    dense = sum(e.dense.params for e in report.plan.entries if e.target)
    assert report.achieved == pytest.approx(1 - saved / dense, abs=1e-12)


@pytest.mark.parametrize(
    ("policy", "unit"), [*((policy, "params") for policy in POLICIES), ("uniform", "macs")]
)
def test_every_policy_shares_out_one_budget(policy: str, unit: str) -> None:
    _, report = compressed(ratio=0.7, policy=policy, unit=unit)
    assert 0.5 < report.achieved <= 0.7
    for site in report.sites:
        assert site.planned == pytest.approx(site.measured, rel=1e-3, abs=1e-6 * site.total)
        assert site.predicted == site.planned


def test_a_shared_basis_loses_less_at_equal_storage() -> None:
    """Of three layers on one input, whose weights are unrelated."""
    _, together = shared(parallel())
    _, apart = shared(parallel(), method="whitened")
    assert together.achieved <= 0.7
    assert together.sites[0].measured < sum(site.measured for site in apart.sites)


def test_the_first_in_call_order_owns_and_the_call_order_is_not_the_models() -> None:
    model, report = shared(parallel())
    assert type(model.c) is LowRankLinear
    assert model.a.owner is model.b.owner is model.c
    assert [entry.group for entry in report.plan.entries] == ["c"] * 3
    outputs = model(X)
    dense = lowrank.to_dense(model, copy=True)
    torch.testing.assert_close(dense(X), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "opt", "bert", "t5", "vit"])
def test_through_files_copies_casts_and_back_to_dense(kind: str, tmp_path: Path) -> None:
    model, _ = compressed(kind)
    owners = {n: m.owner for n, m in model.named_modules() if type(m) is SharedLowRankLinear}
    assert owners
    want = logits(model, kind)
    lowrank.save(model, tmp_path / "one")
    loaded = type(model).from_pretrained(tmp_path / "one").eval()
    for found in (loaded, copy.deepcopy(model), copy.deepcopy(loaded)):
        assert torch.equal(logits(found, kind), want)
        modules = dict(found.named_modules())
        names = {id(module): name for name, module in model.named_modules()}
        assert all(modules[n].owner is modules[names[id(o)]] for n, o in owners.items())
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert not any(f"{name}.down.weight" in stored for name in owners)
    assert logits(loaded.to(torch.bfloat16), kind).dtype == torch.bfloat16
    lowrank.export(model, tmp_path / "dense")
    plain = type(model).from_pretrained(tmp_path / "dense").eval()
    assert not any(type(m) is SharedLowRankLinear for m in plain.modules())
    torch.testing.assert_close(logits(plain, kind), want, rtol=1e-4, atol=1e-5)


def test_it_generates() -> None:
    model, _ = compressed()
    more = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    dense = lowrank.to_dense(model, copy=True)
    ids = tokens(1, 3)
    assert torch.equal(model.generate(ids, **more), dense.generate(ids, **more))


def test_any_module_is_saved_and_loaded_and_a_part_of_it_is_refused(tmp_path: Path) -> None:
    model, _ = shared(parallel())
    lowrank.save(model, tmp_path)
    loaded = lowrank.load(tmp_path, parallel)
    assert torch.equal(loaded(X), model(X))
    assert loaded.a.owner is loaded.c
    index = json.loads((tmp_path / "lowrank.json").read_text())
    assert index["modules"]["a"]["shared"] == "c"
    assert "shared" not in index["modules"]["c"]
    with pytest.raises(LowrankError, match="shares a factored layer that is not in this"):
        lowrank.save(nn.Sequential(model.a), tmp_path / "part")
    for wrong, said in ((None, "a must name"), ("d", "a must name"), ("b", "a: a SharedLow")):
        index["modules"]["a"]["shared"] = wrong
        (tmp_path / "lowrank.json").write_text(json.dumps(index))
        with pytest.raises(LowrankError, match=said):
            lowrank.load(tmp_path, parallel)
    del index["modules"]["c"]
    index["modules"]["a"]["shared"] = "c"
    (tmp_path / "lowrank.json").write_text(json.dumps(index))
    with pytest.raises(LowrankError, match="a must name the factored layer that it shares, got"):
        lowrank.load(tmp_path, parallel)


def test_lrc_trains_every_factor_once() -> None:
    model, _ = compressed()
    found = lowrank.lrc_parameters(model)
    factors = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(found) == len(factors) == len(set(map(id, found)))
    assert ATTENTION.format("q") + ".down.weight" in factors
    assert ATTENTION.format("k") + ".up.weight" in factors
    before = [p.detach().clone() for p in found]
    optimizer = torch.optim.SGD(found, lr=0.1)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert not any(map(torch.equal, before, found))


def test_only_targets_form_groups() -> None:
    model, report = compressed(target_modules=["k_proj", "v_proj", "up_proj"])
    assert type(model.get_submodule(ATTENTION.format("k"))) is LowRankLinear
    assert model.get_submodule(ATTENTION.format("v")).rank
    assert {e.method for e in report.plan.entries} == {"basis-sharing", "whitened", "dense"}
    assert type(model.get_submodule(ATTENTION.format("q"))) is nn.Linear


def test_members_stay_within_one_block() -> None:
    """Cross-attention of all blocks reads the encoder; a basis goes no further than its block."""
    model, _ = compressed("t5")
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention
        assert attention.v.owner is attention.k


def test_members_of_other_kinds_of_numbers_stay_apart() -> None:
    model = parallel()
    model.call = lambda self, x: self.c(x) + self.b(x)[:, :1]
    seen = calibration(model, [X])
    assert seen.observation.groups == (("c", "b"),)
    model.b.double()
    plan = lowrank.plan(model, 0.7, method="basis-sharing", data=seen, progress=False)
    assert {entry.group for entry in plan.entries} == {""}


def test_a_plan_is_carried_out_as_it_was_made() -> None:
    seen = calibration(make("llama"), [tokens()])
    plan = lowrank.plan(make("llama"), 0.6, method="basis-sharing", data=seen, progress=False)
    again = lowrank.Plan.from_json(plan.to_json())
    assert again == plan
    one, report = lowrank.apply(make("llama"), again, data=seen, progress=False)
    other, _ = compressed(data=seen)
    assert torch.equal(logits(one), logits(other))
    assert lowrank.Report.from_json(report.to_json()) == report
    model = make("llama")
    with unchanged(model), pytest.raises(LowrankError, match="basis-sharing works from calibrat"):
        lowrank.apply(model, plan, data=None)


def test_a_rank_for_one_is_a_rank_for_all() -> None:
    name = ATTENTION.format("v")
    model, report = compressed(ratio=None, rank_pattern={"v_proj": 5, "up_proj": 7})
    assert [model.get_submodule(ATTENTION.format(n)).rank for n in "qkv"] == [5] * 3
    edited = report.plan.edit({name: 9})
    model, report = lowrank.apply(make("llama"), edited, data=[tokens()], progress=False)
    assert [model.get_submodule(ATTENTION.format(n)).rank for n in "qkv"] == [9] * 3
    site = next(site for site in report.sites if site.name == name)
    assert site.planned is None
    assert site.predicted == pytest.approx(site.measured, rel=1e-4)
    said = refused(
        make("llama"), method="basis-sharing", data=[tokens()],
        rank_pattern={"q_proj": 5, "v_proj": 6},
    )  # fmt: skip
    assert "different ranks ({'q_proj': 5, 'v_proj': 6})" in said
    said = refused(
        make("llama"), method="basis-sharing", data=[tokens()], rank_pattern={"q_proj": 22}
    )
    assert "rank must be in [1, 32]" in said


def test_data_on_which_they_read_several_tensors_is_refused() -> None:
    plan = lowrank.plan(parallel(), 0.7, method="basis-sharing", data=[X], progress=False)
    model = parallel()
    model.call = lambda self, x: self.c(x) + self.a(x + 1)[:, :8] + self.b(x)[:, :1]
    with unchanged(model), pytest.raises(LowrankError, match="a did not read the same tensor as c"):
        lowrank.apply(model, plan, data=[X], progress=False)
    made = lowrank.plan(model, 0.7, method="basis-sharing", data=[X], progress=False)
    assert [entry.group for entry in made.entries] == ["", "c", "c"]


def test_speed_is_that_of_the_whole_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank.api import applying

    monkeypatch.setattr(applying, "paired_ratio", lambda one, other: len(one()) / len(other()))
    model, report = shared(parallel(), prefer="speed")
    assert all(type(m) is nn.Linear for m in (model.a, model.b, model.c))
    assert report.achieved == 1.0
    assert {site.reason for site in report.sites} == {"factored it takes 1.00 of the dense layer's "
                                                      "time"}  # fmt: skip


def test_it_needs_data() -> None:
    assert "method basis-sharing needs calibration data (gram)" in refused(
        make("llama"), 0.5, method="basis-sharing", data=None
    )
    with pytest.raises(LowrankError, match=r"basis-sharing needs gram: pass calibration="):
        lowrank.sensitivity(make("llama"), [tokens()], method="basis-sharing", progress=False)
    with pytest.raises(LowrankError, match="did you mean 'basis-sharing'"):
        lowrank.plan(make("llama"), 0.5, method="basis_sharing")
