"""Tables by quotient and remainder as a method: laws of all ops, budgets, starts, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.methods import QuotientRemainder
from lowrank.nn import QuotientRemainderEmbedding
from lowrank.testing import check_method
from lowrank.types import Cost, Option, Size, Statistics
from tests.zoo import make


def table(rows: int = 300, columns: int = 8, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return (nn.EmbeddingBag if "mode" in options else nn.Embedding)(rows, columns, **options)


def planted(op: str) -> Any:
    def tables(rows: int, columns: int, rng: torch.Generator) -> tuple[torch.Tensor, Size]:
        """Ids 0 to 3 give zero rows, among them whatever is padding."""
        m, width = (rows + 1) // 2, columns // 2 if op == "concat" else columns
        ids, left = torch.arange(rows), columns - width if op == "concat" else columns
        q, r = torch.randn(2, left, generator=rng), torch.randn(m, width, generator=rng)
        q[0], r[:4] = 0, 0
        parts = q.double()[ids // m], r.double()[ids % m]
        return sum(parts) if op == "add" else torch.cat(parts, 1), (m, width)  # type: ignore[return-value]

    return tables


@pytest.mark.parametrize("op", ["add", "concat"])
def test_the_laws_hold_for_every_op(op: str) -> None:
    method = QuotientRemainder(op=op)
    check_method(method, low_rank=False, planted=planted(op), dtypes=[torch.float32])


def test_random_tables_keep_the_laws_too() -> None:
    method = QuotientRemainder(start="random")
    check_method(method, low_rank=False, planted=None, dtypes=[torch.bfloat16])


@pytest.mark.parametrize("op", ["mult", "add", "concat"])
@pytest.mark.parametrize("ratio", [0.5, 0.25, 1 / 16])
def test_any_budget_is_nearly_used_up(op: str, ratio: float) -> None:
    """Where low rank would end at rank one, 1/8 here."""
    model = nn.Sequential(table(5000))
    small, report = lowrank.compress(
        model, ratio, method=QuotientRemainder(op=op), target_modules="all", progress=False
    )
    assert 0.9 * ratio < report.achieved <= ratio
    layer = small[0]
    assert isinstance(layer, QuotientRemainderEmbedding)
    assert report.params_after == sum(p.numel() for p in layer.parameters())


def test_more_budget_is_nearer_and_the_curve_says_how_near() -> None:
    layer, method = table(), QuotientRemainder()
    errors = []
    for ratio in (0.3, 0.6, 0.9):
        small, report = lowrank.compress(
            layer, ratio, method=method, target_modules="all", copy=True, progress=False
        )
        (site,) = report.sites
        lost = (layer.weight - small.weight).square().sum()
        assert site.measured == pytest.approx(float(lost.detach()), rel=1e-5)
        assert site.planned == pytest.approx(site.measured, rel=0.05)  # between known sizes
        errors.append(site.measured)
    assert errors[0] > errors[1] > errors[2]


def test_trained_from_the_start_saved_and_merged(tmp_path: Path) -> None:
    model = nn.Sequential(table(200, 6, mode="max"), nn.Linear(6, 3))
    start = QuotientRemainder(op="add", start="random", seed=3)
    model, _ = lowrank.compress(model, 0.3, method=start, target_modules=["0"], progress=False)
    ids, wanted = torch.randint(200, (64, 5)), torch.randint(3, (64,))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.05), []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(ids), wanted)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, nn.Sequential(table(200, 6, mode="max"), nn.Linear(6, 3)))
    assert torch.equal(again(ids), model(ids))
    torch.testing.assert_close(lowrank.to_dense(again)(ids), model(ids))


def test_random_tables_follow_the_seed_and_the_scale() -> None:
    layer = table(2000, 8)
    with torch.no_grad():
        layer.weight *= 0.1
    option = Option("", (100, 8), "quotient-remainder", Cost(0, 0, 0), 0.0)
    for op in ("mult", "add"):
        found = [
            QuotientRemainder(op=op, start="random", seed=seed).factor(layer, option, Statistics())
            for seed in (0, 0, 1)
        ]
        values = [new.dense_weight().detach() for new in found]
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])
        assert float(values[0].std()) == pytest.approx(0.1, rel=0.2)


def test_a_plan_keeps_the_op_and_can_be_edited() -> None:
    model = nn.Sequential(table())
    method = QuotientRemainder(op="add")
    plan = lowrank.Plan.from_json(
        lowrank.plan(model, 0.5, method=method, target_modules="all").to_json()
    )
    assert plan.entries[0].method == "quotient-remainder-add"
    edited = plan.edit({"0": (30, 8)})
    assert edited.entries[0].cost.params == 40 * 8
    small, _ = lowrank.apply(model, edited, method=method, data=None)
    assert (small[0].op, small[0].remainders) == ("add", 30)
    with pytest.raises(LowrankError, match="'quotient-remainder-add' is none of"):
        lowrank.apply(nn.Sequential(table()), plan, data=None)
    with pytest.raises(LowrankError, match="not smaller"):
        plan.edit({"0": (301, 8)})
    with pytest.raises(LowrankError, match=r"width of 8\) for op 'add', got \(30, 4\)"):
        lowrank.apply(nn.Sequential(table()), plan.edit({"0": (30, 4)}), method=method, data=None)


def test_what_two_tables_cannot_keep_is_refused() -> None:
    padded = table(padding_idx=4)
    with torch.no_grad():
        padded.weight[4] = 1
    for model, said in (
        (nn.Sequential(padded), "row 4 of the table is its padding_idx and not zero"),
        (make("gpt2"), r"transformer.wte is tied to an output head.*exclude_modules="),
    ):
        with pytest.raises(LowrankError, match=said):
            lowrank.compress(model, 0.5, method="quotient-remainder", target_modules="all")
    bag = table(padding_idx=4, mode="sum")
    with torch.no_grad():
        bag.weight[4] = 1
    lowrank.compress(bag, 0.5, method="quotient-remainder", target_modules="all")
    for options in ({"op": "power"}, {"start": "cold"}):
        with pytest.raises(LowrankError, match="unknown"):
            QuotientRemainder(**options)


def test_tables_of_one_size_are_drawn_apart() -> None:
    model = nn.ModuleList([table(), nn.Embedding(300, 8)])
    start = QuotientRemainder(start="random")
    lowrank.factorize_by_design(model, 0.5, method=start, target_modules="all")
    assert not torch.equal(model[0].remainder.weight, model[1].remainder.weight)


def test_where_speed_is_preferred_lookups_stay_dense() -> None:
    _, report = lowrank.compress(
        nn.Sequential(table()), 0.5, method="quotient-remainder", target_modules="all",
        prefer="speed", data=torch.arange(9), progress=False,
    )  # fmt: skip
    assert "a dense one takes none" in report.sites[0].reason
