"""Forms sized by several numbers, from the one line to the file: plans, edits, round trips."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.methods import Blast, LowRankMasked
from lowrank.nn import (
    BlastLinear,
    DenseSparseLinear,
    LowRankMaskedLinear,
    LowRankSparseLinear,
    SparseDenseLinear,
)
from lowrank.plans.plan import Plan
from tests import zoo

FORMS = {
    "dense-sparse": (DenseSparseLinear, SparseDenseLinear),
    "lowrank-sparse": (LowRankSparseLinear,),
    "blast": (BlastLinear,),
    "lowrank-masked": (LowRankMaskedLinear,),
}
EDITED = {
    "dense-sparse": (9, 3),
    "lowrank-sparse": (5, 2),
    "blast": (3, 4),
    "lowrank-masked": (2, 90),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 17, bias=False)).eval()


def rows() -> torch.Tensor:
    return torch.randn(200, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FORMS)
def way(request: Any) -> str:
    return request.param


def quick(way: str) -> Any:
    """The method by its name, or one that is done soon."""
    return Blast(sweeps=20) if way == "blast" else way


def done(way: str, ratio: Any = 0.6, **more: Any) -> tuple[nn.Module, Any]:
    return lowrank.compress(
        net(),
        ratio,
        method=quick(way),
        data=[rows()],
        progress=False,
        **{"target_modules": "all", **more},
    )


def test_one_line_makes_it_and_the_report_tells(way: str) -> None:
    model, report = done(way)
    assert type(model[0]) in FORMS[way]
    assert type(model[2]) in FORMS[way]
    assert 0.5 < report.achieved <= 0.6
    for site, layer in zip(report.sites, (model[0], model[2]), strict=True):
        assert site.measured is not None
        assert 0.3 * site.predicted <= site.measured <= 1.3 * site.predicted
        assert f"{layer.spec().get('rank')}" in str(report)
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert report.bytes_after == stored
    assert report.params_after == sum(p.numel() for p in model.parameters())
    assert way in str(report.plan)
    slow = any("not faster" in note for note in report.notes)
    work = [layer.rank * (layer.in_features + layer.out_features) for layer in (model[0], model[2])
            if way == "dense-sparse"]  # fmt: skip
    most = zip(work, (20 * 30, 30 * 17), strict=False)
    assert slow == (way == "lowrank-masked" or any(a >= b for a, b in most))  # zeros multiply too


@pytest.mark.parametrize("unit", ["bytes", "macs"])
def test_any_unit_is_a_budget(way: str, unit: Any) -> None:
    if (way, unit) == ("lowrank-masked", "macs"):  # zeros are multiplied too
        with pytest.raises(LowrankError, match="no rank makes any target smaller"):
            done(way, unit=unit)
        return
    _, report = done(way, unit=unit)
    assert 0.5 < report.achieved <= 0.6


def test_a_plan_survives_json_and_an_edit_has_its_price(way: str) -> None:
    model = net()
    plan = lowrank.plan(
        model, 0.6, method=quick(way), data=[rows()], target_modules="all", progress=False
    )
    assert Plan.from_json(plan.to_json()) == plan
    body = json.loads(plan.to_json())
    body["entries"][0]["size"] = [*EDITED[way]]
    by_text, by_hand = Plan.from_json(json.dumps(body)), plan.edit({"0": EDITED[way]})
    assert by_text.entries == by_hand.entries
    assert by_hand.entries[0].error is None
    how = quick(way) if way == "blast" else None  # by name it would take all its sweeps
    new, report = lowrank.apply(model, by_hand, data=[rows()], method=how, progress=False)
    assert new[0].cost() == by_hand.entries[0].cost
    assert new[0].cost().params != plan.entries[0].cost.params
    assert report.achieved == pytest.approx(by_hand.kept())
    left = plan.edit({"0": None})
    assert left.entries[0].size is None
    assert left.edit({"0": EDITED[way]}).entries[0].storage == way


@pytest.mark.parametrize("size", [8, (8,), (8, 0), (8, 2.5), "8,2", (8, 2, 1), (400, 300), True])
def test_an_edit_to_no_size_is_refused(way: str, size: Any) -> None:
    plan = lowrank.plan(
        net(), 0.6, method=quick(way), data=[rows()], target_modules="all", progress=False
    )
    with pytest.raises(LowrankError, match=r"0: .*(has 2 integers >= 1|is not smaller)"):
        plan.edit({"0": size})


def test_an_entry_of_a_plan_with_an_impossible_size_leaves_the_model_alone(way: str) -> None:
    model = net()
    plan = lowrank.plan(
        model, 0.6, method=quick(way), data=[rows()], target_modules="all", progress=False
    )
    odd = {
        "dense-sparse": (3, 5),
        "lowrank-sparse": (1, 21),
        "blast": (21, 1),
        "lowrank-masked": (1, 601),
    }[way]
    entries = (replace(plan.entries[0], size=odd), *plan.entries[1:])
    with zoo.unchanged(model), pytest.raises(LowrankError):
        lowrank.apply(model, replace(plan, entries=entries), data=[rows()], progress=False)


@pytest.mark.parametrize("policy", ["energy", "spectrum", "lossaware"])
def test_policies_that_ask_for_errors_take_them(policy: str) -> None:
    _, report = done("lowrank-sparse", policy=policy)
    assert 0.4 < report.achieved <= 0.6


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"policy": "welore"}, "welore needs singular values; no spectrum for 0"),
        ({"align": 8}, "align=8 rounds ranks, but method"),
        ({"storage": "pivoted"}, "storage='pivoted' is for plain factors, but method"),
        ({"storage": "factors"}, "storage='factors' is for plain factors"),
        ({"ratio": None, "rank": 4}, "whose size is not the rank of two factors: give a ratio"),
        ({"rank_pattern": {"0": 4}}, "whose size is not the rank of two factors"),
        ({"data": None}, "needs calibration data"),
    ],
)
def test_what_speaks_of_ranks_is_refused(way: str, more: dict[str, Any], said: str) -> None:
    arguments = {"ratio": 0.6, "data": [rows()], **more}
    with pytest.raises(LowrankError, match=said):
        lowrank.compress(net(), method=way, progress=False, **arguments)


def test_a_share_of_energy_is_a_size(way: str) -> None:
    _, report = done(way, None, rank=0.7, align=1)
    for site in report.sites:
        assert 0 < site.predicted <= 0.3 * site.total
    _, report = done(way, None, rank=1.0)
    assert all("takes a size that is not smaller" in e.reason for e in report.plan.entries)
    with pytest.raises(LowrankError, match="takes a size which is not smaller"):
        done(way, 0.6, rank_pattern={"0": 1.0})


def test_an_effort_refits_them_in_their_own_form(way: str) -> None:
    """Each is made anew for the stream that it reads, at its size; held-out rows tell the gain."""
    rng = torch.Generator().manual_seed(3)
    model, data = zoo.llama(), torch.randint(0, 59, (16, 24), generator=rng)
    run = {"method": quick(way), "policy": "uniform", "progress": False, "copy": True}
    seen = lowrank.calibrate(model, list(data.split(4)), hold_out=1 / 4, progress=False)
    plain, _ = lowrank.compress(model, 0.6, data=seen, **run)
    new, report = lowrank.compress(model, 0.6, data=seen, effort="fast", **run)
    layers = {n: m for n, m in new.named_modules() if isinstance(m, FORMS[way])}
    assert f"refitted in closed form, layer by layer: {len(layers)}" in report.notes
    assert not any("made it worse" in note for note in report.notes)
    assert {n: m.spec() for n, m in layers.items()} == {
        n: m.spec() for n, m in plain.named_modules() if isinstance(m, FORMS[way])
    }
    after, before = (lowrank.kl(m, model, seen.held_out) for m in (new, plain))
    assert after < before


def test_a_pattern_stays_through_refit_and_is_asked_for_by_a_plan(tmp_path: Path) -> None:
    """A plan's text names 1:4, which no name of a method is: the object is asked for again."""
    model, x = net(), rows()
    run = {"data": [x], "progress": False, "copy": True}
    new, report = lowrank.compress(
        model, 0.7, method="lowrank-2:4", effort="fast", target_modules="all", **run
    )
    for layer in (new[0], new[2]):
        mask = torch.nn.functional.pad(layer.sparse.dense() != 0, (0, -layer.in_features % 4))
        assert int(mask.view(len(mask), -1, 4).sum(-1).max()) == 2
    again, _ = lowrank.apply(model, Plan.from_json(report.plan.to_json()), **run)
    assert torch.equal(again(x), new(x))
    way = LowRankMasked(pattern=(1, 4))
    plan = lowrank.plan(model, 0.6, method=way, data=[x], target_modules="all", progress=False)
    assert {entry.method for entry in plan.entries} == {"lowrank-1:4"} == {plan.method}
    with pytest.raises(LowrankError, match="pass the object as method="):
        lowrank.apply(model, plan, **run)
    new, _ = lowrank.apply(model, plan, method=way, **run)
    assert int((new[0].sparse.dense() != 0).view(30, 5, 4).sum(-1).max()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_llama_round_trip(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    ids = torch.arange(96).reshape(4, 24) % 59
    model, report = lowrank.compress(
        zoo.llama().to(dtype), 0.6, method=quick(way), data=[ids], progress=False,
        target_modules=["k_proj", "o_proj", "down_proj"],
    )  # fmt: skip
    assert report.achieved <= 0.6
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".md", ".py"}
    stored = load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    before, after = model.state_dict(), again.state_dict()
    assert set(stored) - set(before) == {f"{site.name}.weight" for site in report.sites}  # guards
    for name, tensor in stored.items():
        if name not in before:
            continue
        assert torch.equal(before[name], tensor)
        assert torch.equal(after[name], tensor)
        assert after[name].dtype == tensor.dtype
    if dtype == torch.float32:
        with torch.no_grad():
            want = model(input_ids=ids).logits
            assert torch.equal(again(input_ids=ids).logits, want)
            dense = lowrank.to_dense(again)
            torch.testing.assert_close(dense(input_ids=ids).logits, want, atol=1e-4, rtol=1e-4)


def test_a_module_of_ones_own_round_trip(way: str, tmp_path: Path) -> None:
    model, _ = done(way)
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, net())
    with torch.no_grad():
        assert torch.equal(again(rows()), model(rows()))
    for at in ("index", "mix", "sparse.index"):
        name = f"0.{at}"
        if name in model.state_dict():
            assert again.state_dict()[name].dtype == model.state_dict()[name].dtype


def test_a_tied_weight_is_factored_once(way: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(24, 24, bias=False)
            self.other = nn.Linear(24, 24, bias=False)
            self.other.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.one(x).relu())

    torch.manual_seed(0)
    x = torch.randn(100, 24)
    model, report = lowrank.compress(Twice(), 0.6, method=quick(way), data=[x], progress=False)
    assert report.achieved <= 0.6
    stored = {id(p): p for p in model.parameters()}
    assert sum(p.numel() for p in stored.values()) == report.params_after <= 0.6 * 576
    assert type(model.one) in FORMS[way]
    assert torch.equal(model.one.dense_weight(), model.other.dense_weight())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dead_rows_and_a_dead_input_in_16_bits(way: str, dtype: torch.dtype) -> None:
    """A row of zeros stays one, to rounding; nothing becomes NaN."""
    model, data = net(), rows()
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[2].weight.zero_()
    data[:, 3] = 0
    model = model.to(dtype)
    small, report = lowrank.compress(
        model, 0.6, method=quick(way), policy="uniform", data=[data.to(dtype)], copy=True,
        progress=False,
    )  # fmt: skip
    assert isinstance(small[0], FORMS[way])
    assert {p.dtype for p in small.parameters()} == {dtype}
    got, scale = small[0].dense_weight(torch.float32).detach(), model[0].weight.detach().abs().max()
    assert bool(got.isfinite().all())
    assert float(got[:4].abs().max()) < 0.05 * float(scale)
    assert float(small[2].weight.detach().abs().max()) == 0
    assert small(data.to(dtype)).isfinite().all()
    assert report.achieved <= 0.6


def test_prefer_speed_times_them(way: str) -> None:
    _, report = done(way, prefer="speed")
    slow = [site.reason for site in report.sites if site.reason]
    assert all("of the dense layer's time" in reason for reason in slow)


def test_the_input_model_is_untouched_by_copy(way: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    new, _ = lowrank.compress(
        model, 0.6, method=quick(way), data=[rows()], copy=True, progress=False
    )
    assert new is not model
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_auto_gives_each_layer_its_own_form(tmp_path: Path) -> None:
    """One layer has rows of few atoms, the other is of low rank; the plan names both methods."""
    rng = torch.Generator().manual_seed(0)
    chosen = torch.rand(64, 12, generator=rng).topk(3, 1).indices
    code = torch.zeros(64, 12).scatter(1, chosen, torch.randn(64, 3, generator=rng))
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 48, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(code @ torch.randn(12, 32, generator=rng))
        low = torch.randn(48, 3, generator=rng) @ torch.randn(3, 64, generator=rng)
        model[2].weight.copy_(low + 0.01 * torch.randn(48, 64, generator=rng))
    x = torch.randn(300, 32, generator=rng)
    way = lowrank.METHODS["auto"](forms=("factors", "pivoted", "dense-sparse"))
    run = {"data": lambda m: m(x), "copy": True, "progress": False}  # no rows to compare forms by
    new, report = lowrank.compress(model, 0.4, method=way, target_modules="all", **run)
    first, second = report.plan.entries
    assert (first.method, first.storage) == ("dense-sparse", "dense-sparse")
    assert second.method == "whitened"
    assert type(new[0]) is DenseSparseLinear
    assert report.plan.settings["method"] == "auto"
    plan = Plan.from_json(report.plan.to_json())
    assert plan == report.plan
    again, second_report = lowrank.apply(model, plan, **run)
    with torch.no_grad():
        assert torch.equal(again(x), new(x))
    assert second_report.achieved == report.achieved
    for one in report.sites:
        assert one.predicted == one.planned
    lowrank.save(new, tmp_path)
    with torch.no_grad():
        assert torch.equal(lowrank.load(tmp_path, copy.deepcopy(model))(x), new(x))


def test_auto_is_never_worse_than_one_form_alone_on_held_out_rows() -> None:
    """The mix and each form alone are judged by the KL; what is kept is the least of them."""
    rng = torch.Generator().manual_seed(1)
    torch.manual_seed(2)  # of a net that one form alone serves better than the mix
    model = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 7)
    )
    data = [torch.randn(64, 32, generator=rng) for _ in range(6)]
    seen = lowrank.calibrate(model, data, hold_out=1 / 3, progress=False)
    best = set()
    cases = [(("factors", "pivoted", "dense-sparse"), "uniform")]
    for forms, policy in [*cases, (("factors", "pivoted"), "spectrum")]:
        way = lowrank.METHODS["auto"](forms=forms)
        options = {
            "policy": policy, "align": 1, "target_modules": "all", "copy": True, "progress": False,
        }  # fmt: skip
        new, report = lowrank.compress(model, 0.5, method=way, data=seen, **options)
        judged = report.plan.settings["forms"]
        assert set(judged) == {"mixed", *forms}
        away = lowrank.kl(new, model, seen.held_out)
        assert away == pytest.approx(min(judged.values()), rel=1e-5)
        for form in forms:
            one = lowrank.METHODS["auto"](forms=(form,))
            alone, _ = lowrank.compress(model, 0.5, method=one, data=seen, **options)
            assert away <= lowrank.kl(alone, model, seen.held_out) * (1 + 1e-5)
        assert any("KL of the forms" in note for note in report.notes)
        best.add(min(judged, key=judged.__getitem__))
    assert best > {"factors"}  # a form alone won somewhere, and not everywhere


def test_auto_compares_nothing_where_there_is_nothing_to_judge_by() -> None:
    model = net()
    plan = lowrank.plan(
        model, 0.6, method=lowrank.METHODS["auto"](forms=("factors", "pivoted")),
        data=lambda m: m(rows()), progress=False,
    )  # fmt: skip
    assert "forms" not in plan.settings
