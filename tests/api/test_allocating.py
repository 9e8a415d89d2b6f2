"""Budgets are met to the last number, and ranks are those that were asked for."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, Plan, Recovery
from lowrank.api import allocating
from lowrank.api.allocating import NEAR, Judge
from lowrank.methods.resolved import resolve
from lowrank.plans.entry import break_even
from lowrank.policies.common import at_most
from lowrank.recover.workbench import Workbench
from lowrank.types import Allocation, Option
from lowrank.walk.sites import find_sites, select_sites
from tests.zoo import calibration, make, mlp, said, tokens

SIZES = (24, 40, 16, 30)


def plan(*args: Any, sizes: tuple[int, ...] = SIZES, **kwargs: Any) -> Plan:
    torch.manual_seed(0)
    return lowrank.plan(mlp(*sizes), *args, **{"target_modules": "all", **kwargs})


def ranks(made: Plan) -> dict[str, Any]:
    return {entry.name: entry.size and entry.size[0] for entry in made.entries}


def spent(made: Plan, unit: str = "params") -> int:
    return sum(entry.cost.of(unit) for entry in made.entries if entry.target)


# Ratios


@pytest.mark.parametrize("ratio", [0.2, 0.29, 0.5, 0.7, 0.93])
@pytest.mark.parametrize("policy", ["uniform", "energy", "welore", "spectrum"])
def test_no_more_is_kept_than_was_asked(policy: str, ratio: float) -> None:
    made = plan(ratio, policy=policy, align=1)
    assert made.kept() <= ratio
    step = max(sum(entry.shape) for entry in made.entries)
    slack = {"welore": 3 * step, "energy": 3 * step}.get(policy, len(made.entries) * step)
    whole = sum(math.prod(entry.shape) for entry in made.entries)
    assert spent(made) > math.floor(Fraction(str(ratio)) * whole) - slack


@pytest.mark.parametrize("ratio", [0.1, 0.28, 0.29, 0.57, 0.58])
def test_uniform_is_the_largest_rank_within_the_share(ratio: float) -> None:
    """Of a square layer of 100 numbers a side."""
    made = plan(ratio, sizes=(100, 100), align=1)
    assert ranks(made) == {"0": int(Fraction(str(ratio)) * 10_000 // 200)}


def test_one_unit_decides() -> None:
    """Rank 15 of 100 by 100 costs 3,000: it is there at 0.3, and not just below."""
    assert ranks(plan(0.3, sizes=(100, 100), align=1)) == {"0": 15}
    assert ranks(plan(0.29999, sizes=(100, 100), align=1)) == {"0": 14}


def test_of_the_model_counts_all_that_stays() -> None:
    model = make("llama")
    whole = sum(parameter.numel() for parameter in model.parameters())
    made = lowrank.plan(model, 0.8, data=None, of="model", align=1)
    targets = sum(math.prod(e.shape) for e in made.entries if e.target)
    assert whole - targets + spent(made) <= 0.8 * whole
    assert whole - targets + spent(made) > 0.8 * whole - 14 * 80
    assert made.kept_of_model() == pytest.approx(0.8, abs=0.04)
    assert made.kept() < 0.8  # the embedding and the head take their part


@pytest.mark.parametrize("unit", ["params", "bytes", "macs"])
def test_units(unit: str) -> None:
    """One layer in float64, one in float32: bytes weigh the first twice."""
    model = nn.ModuleDict({"wide": nn.Linear(64, 64).double(), "slim": nn.Linear(64, 64)})
    made = lowrank.plan(model, 0.5, unit=unit, align=1, policy="spectrum")
    sizes = {"wide": 8, "slim": 4} if unit == "bytes" else {"wide": 1, "slim": 1}
    kept = sum(sizes[entry.name] * 128 * (entry.size or (32,))[0] for entry in made.entries)
    whole = sum(64 * 64 * size for size in sizes.values())
    assert whole * 0.5 - 128 * 8 < kept <= whole * 0.5
    assert made.kept() == pytest.approx(kept / whole)
    assert made.unit == unit


def test_excluded_sites_do_not_count_as_targets() -> None:
    made = plan(0.5, exclude_modules=["2"], align=1)
    assert [entry.target for entry in made.entries] == [True, False, True]
    assert made.kept() == pytest.approx(0.5, abs=0.05)


# What cannot be reached


@pytest.mark.parametrize("policy", ["uniform", "energy", "welore", "spectrum"])
@pytest.mark.parametrize("of", ["targets", "model"])
@pytest.mark.parametrize("align", [None, 8])
def test_the_smallest_reachable_ratio_is_named_and_works(
    policy: str, of: Any, align: int | None
) -> None:
    def ask(ratio: float) -> Plan:
        return plan(ratio, policy=policy, of=of, align=align)

    with pytest.raises(LowrankError) as caught:
        ask(0.01)
    message = said(caught)
    assert f"ratio 0.01 of the {of} cannot be reached" in message
    (named,) = re.findall(r"smallest, (0\.\d{4}) of the params are kept", message)
    made = ask(float(named))
    least = align or 1
    assert ranks(made) == {"0": least, "2": least, "4": least}
    with pytest.raises(LowrankError):
        ask(float(named) - 0.0001)


def test_the_named_ratio_is_rounded_up_exactly() -> None:
    """Two of 20 · 20 numbers at rank one: 80 of 800 is 0.1, and no more is asked for."""
    with pytest.raises(LowrankError, match=r"0\.1000 of the params"):
        plan(0.0999, sizes=(20, 20, 20))
    assert ranks(plan(0.1, sizes=(20, 20, 20))) == {"0": 1, "2": 1}


def test_nothing_can_be_made_smaller() -> None:
    with pytest.raises(LowrankError, match="no rank makes any target smaller") as caught:
        plan(0.9, sizes=(20, 1))
    said(caught)
    with pytest.raises(LowrankError, match="no rank that is a multiple of 64 makes"):
        plan(0.9, align=64)


def test_pinned_sites_may_take_more_than_the_ratio() -> None:
    with pytest.raises(LowrankError, match="cannot be reached: with every target"):
        plan(0.2, rank_pattern={"2": 9, "4": 9})


# Ranks


def test_an_integer_is_a_rank_for_all() -> None:
    assert ranks(plan(rank=7)) == {"0": 7, "2": 7, "4": 7}
    assert plan(rank=7).settings["policy"] == "fixed"


def test_above_break_even_a_site_stays_dense_and_says_so() -> None:
    """24 · 40 / 64 = 15; 40 · 16 / 56 = 11.4; 16 · 30 / 46 = 10.4."""
    made = plan(rank=11)
    assert ranks(made) == {"0": 11, "2": 11, "4": None}
    reason = made.entries[2].reason
    assert reason == "not smaller at rank 11; the largest rank that saves is 10"
    for entry in made.entries:
        assert (break_even(entry.shape) > 11) == (entry.size is not None)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_a_float_is_the_share_of_energy_that_each_site_keeps(share: float) -> None:
    model = mlp(*SIZES)
    made = lowrank.plan(model, rank=share, target_modules="all")
    for entry in made.entries:
        energy = torch.linalg.svdvals(model[int(entry.name)].weight.double()).square()
        kept = energy.cumsum(0) / energy.sum()
        needed = int((kept < share).sum()) + 1
        assert (entry.size or (needed,))[0] == needed
        assert (entry.size is None) == (needed >= break_even(entry.shape))
    assert ("above 10, which is not smaller" in made.entries[2].reason) == (share == 0.95)


def test_all_the_energy_of_a_matrix_of_full_rank_stays_dense() -> None:
    made = plan(rank=1.0)
    assert set(ranks(made).values()) == {None}
    assert "keeping 1.0 of its energy takes a rank above 14" in made.entries[0].reason


def test_align_holds_for_shares_of_energy_too() -> None:
    free, aligned = plan(rank=0.5), plan(rank=0.5, align=4)
    for one, other in zip(free.entries, aligned.entries, strict=True):
        assert other.size == (-(-one.size[0] // 4) * 4,)  # at least the share


def test_a_weight_of_low_rank_needs_no_more_than_it_has() -> None:
    model = mlp(16, 16)
    with torch.no_grad():
        model[0].weight.zero_()
    made = lowrank.plan(model, rank=4)
    assert ranks(made) == {"0": 1}
    assert made.entries[0].error == 0


# Patterns of ranks


def test_rank_pattern_alone_leaves_the_rest_dense() -> None:
    made = plan(rank_pattern={"0": 3, "4": 0.5})
    found = ranks(made)
    assert found["0"] == 3
    assert found["2"] is None
    assert 1 <= found["4"] < 10
    assert made.entries[1].reason == "not in rank_pattern"
    assert made.settings["policy"] == "fixed"


def test_rank_pattern_on_top_of_a_ratio() -> None:
    made = plan(0.5, rank_pattern={"2": 3}, align=1)
    assert ranks(made)["2"] == 3
    whole = sum(math.prod(entry.shape) for entry in made.entries)
    assert 0.5 * whole - 110 < spent(made) <= 0.5 * whole  # the others take what is left
    alone = plan(0.5, align=1)
    assert ranks(made)["0"] > ranks(alone)["0"]


def test_rank_pattern_on_top_of_a_rank() -> None:
    assert ranks(plan(rank=7, rank_pattern={"2": 3})) == {"0": 7, "2": 3, "4": 7}
    found = ranks(plan(rank=0.5, rank_pattern={"2": 3}))
    assert found["2"] == 3


def test_rank_pattern_is_kept_whatever_align_says() -> None:
    found = ranks(plan(0.5, rank_pattern={"2": 3}, align=4))
    assert found["2"] == 3
    assert found["0"] % 4 == found["4"] % 4 == 0


@pytest.mark.parametrize("value", [11, 30, 31])
def test_above_break_even_a_rank_pattern_is_an_error(value: int) -> None:
    with pytest.raises(LowrankError, match=rf"for 4 of shape \(30, 16\), got {value}; from 11 on"):
        plan(rank_pattern={"4": value})


def test_a_share_that_no_smaller_rank_holds_is_an_error_in_a_rank_pattern() -> None:
    with pytest.raises(LowrankError, match=r"keeping 1.0 of the energy of 4 takes a rank of 11"):
        plan(rank_pattern={"4": 1.0})


# Alignment


def test_an_integer_forces_multiples() -> None:
    for align in (3, 4, 8):
        found = ranks(plan(0.7, align=align))
        assert all(rank % align == 0 for rank in found.values())
        assert plan(0.7, align=align).kept() <= 0.7


def test_one_switches_alignment_off_and_none_rounds_where_it_is_nearly_free() -> None:
    """One rank of 105 is less than 1 % of the site's budget; seven of 103 are more."""
    from lowrank.policies.common import LOSSLESS

    torch.manual_seed(0)
    made = {a: ranks(lowrank.plan(mlp(260, 260), 0.799, align=a)) for a in (None, 1, 8)}
    exact = int(Fraction("0.799") * 260 * 260 // 520)
    assert made[1] == {"0": exact} == {"0": 103}
    assert made[8] == {"0": 96}
    assert made[None] == {"0": 103}  # 7 of 103 would be lost: more than 1 %
    at_105 = lowrank.plan(mlp(260, 260), 0.808, align=None)
    assert ranks(at_105) == {"0": 104}  # 1 of 105 is nearly free
    assert ranks(lowrank.plan(mlp(260, 260), 0.808, align=1)) == {"0": 105}
    assert 1 / 105 < LOSSLESS < 7 / 103


# Policies of one's own


def halve(curves: Any, budget: Any, probe: Any) -> Any:
    return {curve.sites: curve.options[len(curve.options) // 2] for curve in curves}


def test_a_policy_may_be_any_callable() -> None:
    made = plan(0.9, policy=halve, align=1)
    assert ranks(made) == {"0": 8, "2": 7, "4": 6}
    assert made.settings["policy"] == "function"


@pytest.mark.parametrize("ratio", [0.6, 0.3])
def test_a_model_of_one_output_is_judged(ratio: float) -> None:
    """A KL over its one class was 0 for every option, so that the smallest were chosen."""
    torch.manual_seed(0)
    model, rows = mlp(32, 64, 64, 1), [torch.randn(64, 32) for _ in range(4)]
    run: dict[str, Any] = {"data": rows, "align": 1, "copy": True, "progress": False}
    away = {}
    for policy in ("uniform", "lossaware"):
        small, report = lowrank.compress(model, ratio, policy=policy, **run)
        assert ratio - 0.04 < report.achieved <= ratio
        away[policy] = float((small(rows[-1]) - model(rows[-1])).detach().square().sum())
    assert away["lossaware"] < 1.2 * away["uniform"]  # chosen on other rows
    recovery = lowrank.Recovery(distill_steps=20, shrinkage=0.0)
    _, report = lowrank.compress(model, ratio, method="whitened", effort=recovery, **run)
    assert any(note.startswith("relative squared error on held-out rows") for note in report.notes)
    assert not any("KL" in note or "reverted" in note for note in report.notes)
    (point,) = lowrank.sweep(model, [ratio], data=rows, progress=False).points
    assert point.kl is None


def test_a_policy_is_told_its_budget() -> None:
    asked = []

    def note(curves: Any, budget: Any, probe: Any) -> Any:
        asked.append(budget)
        return halve(curves, budget, probe)

    made = plan(0.9, policy=note, unit="bytes", rank_pattern={"2": 3})
    whole = sum(4 * math.prod(entry.shape) for entry in made.entries)
    assert asked[0].unit == "bytes"
    assert asked[0].limit == math.floor(Fraction("0.9") * whole) - 4 * 3 * 56


def test_a_ratio_is_the_decimal_that_was_written() -> None:
    """0.29 · 100 is 28.999999999999996 in binary."""
    asked = []

    def note(curves: Any, budget: Any, probe: Any) -> Any:
        asked.append(budget.limit)
        return halve(curves, budget, probe)

    plan(0.29, sizes=(10, 10), policy=note)
    assert asked == [29]


def test_a_policy_that_forgets_a_site_is_told() -> None:
    def lazy(curves: Any, budget: Any, probe: Any) -> dict[tuple[str, ...], Option]:
        return {curves[0].sites: curves[0].dense}

    with pytest.raises(LowrankError, match="the policy chose no option for 2, 4"):
        plan(0.9, policy=lazy)


def test_a_policy_may_keep_a_site_dense() -> None:
    def generous(curves: Any, budget: Any, probe: Any) -> Any:
        return {curve.sites: curve.dense for curve in curves}

    made = plan(0.9, policy=generous)
    assert {entry.reason for entry in made.entries} == {"the policy keeps it dense"}
    assert made.kept() == 1.0


def test_a_shape_without_a_smaller_rank_says_so() -> None:
    made = plan(0.5, sizes=(64, 64, 1))
    assert made.entries[1].reason == "no rank makes a weight of this shape smaller"
    assert made.settings["method"] == "svd"


def test_a_site_below_the_alignment_says_so() -> None:
    made = plan(0.6, sizes=(64, 64, 8), align=16)
    assert made.entries[1].reason == "no multiple of 16 makes it smaller; the largest rank is 7"


def test_the_same_curves_serve_every_ratio() -> None:
    model = make("llama")
    found = calibration(model, tokens(4, 16))
    kept = [lowrank.plan(model, ratio, data=found).kept() for ratio in (0.3, 0.6, 0.9)]
    assert kept == sorted(kept)
    assert len(set(kept)) == 3


# Candidates


def judge_of(model: nn.Module, *ranks: int) -> tuple[Judge, list[Allocation]]:
    """A judge, and an allocation of each rank for all layers of the blocks."""
    data = lowrank.calibrate(model, tokens(24, 12), hold_out=0.125, progress=False)
    sites = select_sites(find_sites(model), model)
    resolved = resolve("whitened", data=True)
    targets = [site for site in sites if not site.reason]
    curves = [resolved.curve([site], data) for site in targets]
    groups = {site.names: (site,) for site in targets}
    judge = Judge(Workbench(model, data), groups, resolved.knowing(curves), Recovery())
    return judge, [
        {curve.sites: at_most(curve, rank) or curve.dense for curve in curves} for rank in ranks
    ]


def test_what_is_far_behind_before_the_refit_is_not_refitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, real, asked = make("llama").eval(), allocating.refitted_twins, []

    def spy(bench: Any, works: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append([{entry.size for _, entry, _ in work} for work in works])
        return real(bench, works, *args, **kwargs)

    monkeypatch.setattr(allocating, "refitted_twins", spy)
    judge, allocations = judge_of(model, 5, 1, 5)
    good, bad, same = judge.compare(allocations)
    assert asked == [[{(5,)}, {(5,)}]]  # those that are near, together
    assert good == same == pytest.approx(judge(allocations[0]))
    without = replace(judge, recovery=None)
    assert bad == max(without(allocations[1]), good)
    assert without(allocations[1]) > NEAR * without(allocations[0])
    asked.clear()
    assert judge.compare(allocations[:2]) == without.compare(allocations[:2])
    assert asked == []  # one is ahead: what the refit makes of it decides nothing


def test_batch_norms_are_re_estimated_before_candidates_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Off their moments they hide which of two candidates is near."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)).eval()
    calls = []
    monkeypatch.setattr(
        allocating, "refitted_twins",
        lambda bench, works, *_, **__: calls.append(len(works)) or [bench.model for _ in works],
    )  # fmt: skip
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    lowrank.plan(model, 0.6, data=x, effort="fast", target_modules="all")
    assert calls
    assert all(count > 1 for count in calls)
