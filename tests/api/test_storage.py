"""storage="pivoted" through plan, compress and apply: higher ranks at the cost that was asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, Plan
from lowrank.api import applying
from lowrank.measure.size import model_cost
from lowrank.methods import SVD
from lowrank.methods.common import pivoted_curve
from lowrank.nn import LowRankLinear, PivotedLinear
from lowrank.policies import POLICIES
from lowrank.types import Curve, Option, Site, Statistics
from tests.zoo import make, mlp, said, tokens, unchanged

X = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
PIVOTED: dict[str, Any] = {"storage": "pivoted", "progress": False}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(24, 40, 24)


def layers(model: nn.Module, kind: type[nn.Module] = PivotedLinear) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("data", [None, X])
def test_ranks_are_higher_and_errors_smaller_at_the_same_ratio(data: Any) -> None:
    (_, plain), (model, report) = (
        lowrank.compress(net(), 0.7, data=data, storage=storage, progress=False)
        for storage in (None, "pivoted")
    )
    assert len(layers(model)) == 2
    assert 0.6 < report.achieved <= 0.7
    for before, after, measured in zip(
        plain.plan.entries, report.plan.entries, report.sites, strict=True
    ):
        assert (before.storage, after.storage) == ("factors", "pivoted")
        assert after.size > before.size
        assert after.error < before.error
        assert measured.planned == measured.predicted == after.error
        assert measured.measured == pytest.approx(after.error, rel=1e-4)
    found = sum(p.numel() for n, p in model.named_parameters() if not n.endswith("bias"))
    assert report.achieved == found / (24 * 40 + 40 * 24) == report.plan.kept()
    assert "whitened, pivoted" in str(report) or "svd, pivoted" in str(report)
    assert report.plan.settings["storage"] == "pivoted"


def test_none_is_plain_factors() -> None:
    plans = [lowrank.plan(net(), 0.7, storage=storage) for storage in (None, "factors")]
    assert plans[0] == plans[1]
    assert {entry.storage for entry in plans[0].entries} == {"factors"}


def test_an_unknown_storage_is_refused() -> None:
    model = net()
    with unchanged(model), pytest.raises(LowrankError) as caught:
        lowrank.compress(model, 0.7, storage="pivot")  # type: ignore[arg-type]
    assert "unknown storage 'pivot'" in said(caught)
    assert "pivoted" in said(caught)


def test_the_index_is_counted_as_bytes_and_not_as_parameters() -> None:
    model, report = lowrank.compress(net().half(), 0.7, **PIVOTED)
    numbers = sum(p.numel() for p in model.parameters())
    orders = sum(layer.order.numel() for layer in layers(model))
    assert orders == 24 + 24
    assert report.params_after == numbers
    assert report.bytes_after == 2 * numbers + 4 * orders
    assert model_cost(model, []).bytes == report.bytes_after
    assert lowrank.benchmark(model, X.half()).bytes == report.bytes_after
    twice = nn.ModuleList([model, model])
    assert model_cost(twice, []) == model_cost(model, [])  # each stored tensor once
    asked = lowrank.plan(net().half(), 0.7, unit="bytes", **PIVOTED)
    assert asked.kept("bytes") <= 0.7 < report.plan.kept("bytes")


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_meets_the_budget(policy: str) -> None:
    for ratio in (0.4, 0.9, 0.97):
        found = lowrank.plan(net(), ratio, policy=policy, **PIVOTED)
        assert ratio - 0.1 < found.kept() <= ratio
        assert any(entry.storage == "pivoted" for entry in found.entries)


def test_fixed_ranks_go_up_to_the_pivoted_break_even() -> None:
    model = mlp(24, 24, 24)  # (24 − r)² numbers are saved: more than 24 indices up to rank 19
    found = lowrank.plan(model, rank=19, **PIVOTED)
    assert [entry.size for entry in found.entries] == [(19,), (19,)]
    full = lowrank.plan(model, rank=24, **PIVOTED)
    assert [entry.size for entry in full.entries] == [None, None]
    assert "not smaller at rank 24; the largest rank that saves is 19" in full.entries[0].reason
    share = lowrank.plan(model, rank=0.99, **PIVOTED)
    assert all(entry.size and entry.size[0] > 12 for entry in share.entries)
    pinned = lowrank.plan(model, rank_pattern={"2": 18}, **PIVOTED)
    assert [entry.size for entry in pinned.entries] == [None, (18,)]
    with pytest.raises(LowrankError, match="from 20 on a pivoted layer is not smaller"):
        lowrank.plan(model, rank_pattern={"2": 20}, **PIVOTED)
    with pytest.raises(LowrankError, match="takes a rank of 20 or more"):
        lowrank.plan(model, rank_pattern={"2": 1.0}, **PIVOTED)
    with pytest.raises(LowrankError, match="from 12 on a factored layer is not smaller"):
        lowrank.plan(model, rank_pattern={"2": 18})


def test_ranks_are_aligned() -> None:
    forced = lowrank.plan(mlp(64, 64, 64), 0.8, align=8, **PIVOTED)
    assert {entry.size[0] % 8 for entry in forced.entries if entry.size} == {0}
    assert max(entry.size[0] for entry in forced.entries if entry.size) > 31
    wide = mlp(512, 512)  # 1 − √0.2 of 512 is 283; 280 costs less than 1 % less
    assert lowrank.plan(wide, 0.8, **PIVOTED).entries[0].size == (280,)
    assert lowrank.plan(wide, 0.8, align=1, **PIVOTED).entries[0].size == (283,)


def test_an_edited_plan_stays_pivoted() -> None:
    model = mlp(24, 24, 24, 24)
    made = lowrank.plan(model, 0.7, target_modules=["0", "2"], **PIVOTED)
    found = made.edit({"0": 17, "2": None, "4": 18})
    assert [entry.storage for entry in found.entries] == ["pivoted", "dense", "pivoted"]
    with pytest.raises(LowrankError, match="from 20 on a pivoted layer"):
        made.edit({"0": 20})
    again = Plan.from_json(found.to_json())
    assert again == found
    new, report = lowrank.apply(model, again)
    assert [layer.rank for layer in layers(new)] == [17, 18]
    for entry, layer in zip(again.entries[::2], layers(new), strict=True):
        assert layer.cost() == entry.cost
    assert report.sites[0].predicted == pytest.approx(report.sites[0].measured, rel=1e-3)


def test_a_plan_says_by_hand_what_its_layers_are_stored_as() -> None:
    made = lowrank.plan(mlp(24, 24), 0.7, storage="factors")
    text = made.to_json().replace(
        '"storage": "factors",\n   "cost"', '"storage": "pivoted",\n   "cost"'
    )
    found = Plan.from_json(text).entries[0]
    assert found.storage == "pivoted"
    assert found.cost.params == found.size[0] * (48 - found.size[0])
    with pytest.raises(LowrankError, match="storage"):
        Plan.from_json(
            made.to_json().replace(
                '"storage": "factors",\n  "prefer"', '"storage": "x",\n  "prefer"'
            )
        )


def test_prefer_speed_times_the_pivoted_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def ratio(one: Any, other: Any) -> float:
        timed.extend(one.__closure__[1].cell_contents)
        assert [y.shape for y in one()] == [y.shape for y in other()]
        return 0.5 if len(timed) == 1 else 0.99

    monkeypatch.setattr(applying, "paired_ratio", ratio)
    model, report = lowrank.compress(net(), 0.7, data=X, prefer="speed", **PIVOTED)
    assert {type(layer) for layer in timed} == {PivotedLinear}
    assert [type(model[0]), type(model[2])] == [PivotedLinear, nn.Linear]
    assert report.rows()[1]["reason"] == "factored it takes 0.99 of the dense layer's time"


def test_a_whole_model_with_data_and_embeddings() -> None:
    model = make("llama")
    dense = model(tokens()).logits
    model, report = lowrank.compress(model, 0.9, data=[tokens()], target_modules="all", **PIVOTED)
    kinds = {entry.kind: entry.storage for entry in report.plan.entries if entry.size}
    assert kinds == {"linear": "pivoted", "embedding": "factors"}
    assert len(layers(model)) > 10
    assert (model(tokens()).logits - dense).norm() < 0.5 * dense.norm()


def test_layers_without_data_are_pivoted_too() -> None:
    model = net()
    seen = lowrank.calibrate(model, lambda m: m[0](X), progress=False)
    made = lowrank.plan(model, 0.7, data=seen, on_missing="data-free", **PIVOTED)
    assert [entry.method for entry in made.entries] == ["whitened", "svd"]
    assert {entry.storage for entry in made.entries} == {"pivoted"}
    model, _ = lowrank.apply(model, made, data=seen)
    assert len(layers(model)) == 2


class Plain:
    """A method of one's own that gives plain factors, or something else."""

    kinds, needs = frozenset({"linear"}), frozenset[str]()

    def __init__(self, gives: type[nn.Module] = LowRankLinear) -> None:
        self.gives = gives

    def curve(self, site: Site, stats: Statistics) -> Curve:
        return SVD().curve(site, stats)

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        rank = option.size[0] if option.size else 0
        u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
        plain = LowRankLinear.from_factors(v[:rank], u[:, :rank] * s[:rank], module.bias)
        return plain if self.gives is LowRankLinear else self.gives()


def test_plain_factors_of_one_s_own_method_are_converted() -> None:
    model, report = lowrank.compress(net(), 0.7, method=Plain(), **PIVOTED)
    assert len(layers(model)) == 2
    assert report.sites[0].measured == pytest.approx(report.sites[0].planned, rel=1e-3)
    other = net()
    with unchanged(other), pytest.raises(LowrankError, match="gives Identity: omit storage"):
        lowrank.compress(other, 0.7, method=Plain(nn.Identity), **PIVOTED)


def test_a_curve_of_pivoted_factors_is_as_exact_as_it_was() -> None:
    model = net()
    site = Site(
        "0", ("0",), "linear", (model[0],), (40, 24), lowrank.walk.layouts.dense_cost(model[0])
    )
    curve = pivoted_curve(SVD().curve(site, Statistics()), site)
    assert curve.exact
    assert len(curve.options) == 23  # ranks 1…22, and dense


def test_training_moves_every_factor_and_nothing_else() -> None:
    model, _ = lowrank.compress(net(), 0.7, **PIVOTED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(lowrank.lrc_parameters(model), lr=0.1)
    model(X).square().mean().backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.endswith("order"), name


def test_it_is_factored_already_and_merges_back() -> None:
    model, _ = lowrank.compress(net(), 0.7, **PIVOTED)
    want = model(X)
    with pytest.raises(LowrankError, match="2 are factored already"):
        lowrank.compress(model, 0.5)
    dense = lowrank.to_dense(model)
    assert [type(dense[0]), type(dense[2])] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(dense(X), want)
