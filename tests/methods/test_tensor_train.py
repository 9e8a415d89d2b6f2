"""Tensor trains as a method: budgets, starts, fits, files, refusals. The laws are in the roster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.methods import TensorTrain
from lowrank.nn import TensorTrainEmbedding
from lowrank.testing import check_method
from lowrank.types import Cost, Option, Statistics
from tests.zoo import make


def table(rows: int = 300, columns: int = 8, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return (nn.EmbeddingBag if "mode" in options else nn.Embedding)(rows, columns, **options)


def test_random_cores_keep_the_laws_too() -> None:
    method = TensorTrain(start="random")
    check_method(method, low_rank=False, planted=None, dtypes=[torch.bfloat16])


@pytest.mark.parametrize("ratio", [0.5, 0.25, 1 / 16])
def test_any_budget_is_nearly_used_up(ratio: float) -> None:
    """Where low rank would end at rank one, 1/8 here."""
    model = nn.Sequential(table(5000))
    small, report = lowrank.compress(
        model, ratio, method="tensor-train", target_modules="all", progress=False
    )
    assert 0.85 * ratio < report.achieved <= ratio
    layer = small[0]
    assert isinstance(layer, TensorTrainEmbedding)
    assert report.params_after == sum(p.numel() for p in layer.parameters())


def test_more_budget_is_nearer_and_the_curve_bounds_the_error() -> None:
    """343 places for 300 rows: what the cores hold beyond the table is counted too."""
    layer, errors = table(), []
    for ratio in (0.2, 0.5, 0.8):
        small, report = lowrank.compress(
            layer, ratio, method="tensor-train", target_modules="all", copy=True, progress=False
        )
        (site,) = report.sites
        lost = float((layer.weight - small.weight).detach().square().sum())
        assert site.measured == pytest.approx(lost, rel=1e-5)
        assert 0.9 * site.planned < site.measured <= site.planned * (1 + 1e-6)
        errors.append(lost)
    assert errors[0] > errors[1] > errors[2]


def test_trained_from_the_start_saved_and_merged(tmp_path: Path) -> None:
    model = nn.Sequential(table(200, 6, mode="max"), nn.Linear(6, 3))
    model, _ = lowrank.factorize_by_design(
        model, 0.3, method=TensorTrain(start="random", seed=3), target_modules=["0"]
    )
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


def test_random_cores_follow_the_seed_and_the_scale() -> None:
    layer = table(3000, 8)
    with torch.no_grad():
        layer.weight *= 0.1
    option = Option("", (9, 7), "tensor-train", Cost(0, 0, 0), 0.0)
    found = [
        TensorTrain(start="random", seed=seed).factor(layer, option, Statistics())
        for seed in (0, 0, 1)
    ]
    values = [new.dense_weight().detach() for new in found]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert float(values[0].std()) == pytest.approx(0.1, rel=0.2)


def test_the_padding_row_of_a_bag_is_left_out_and_counted() -> None:
    """It is never read: cores are fitted to zeros there, and the error says what was given up."""
    bag = table(padding_idx=4, mode="sum")
    with torch.no_grad():
        bag.weight[4] = 100
    small, report = lowrank.compress(
        bag, 0.8, method="tensor-train", target_modules="all", copy=True, progress=False
    )
    (site,) = report.sites
    assert 8e4 < site.measured <= site.planned < 8.2e4
    others = torch.arange(300) != 4
    near = (bag.weight - small.weight).detach()[others].square().mean()
    assert float(near) < 0.5


def test_a_plan_can_be_edited() -> None:
    plan = lowrank.Plan.from_json(
        lowrank.plan(
            nn.Sequential(table()), 0.5, method="tensor-train", target_modules="all"
        ).to_json()
    )
    edited = plan.edit({"0": (3, 5)})
    small, _ = lowrank.apply(nn.Sequential(table()), edited, data=None)
    assert (small[0].left, small[0].right) == (3, 5)
    assert edited.entries[0].cost == small[0].cost()
    with pytest.raises(
        LowrankError, match=r"ranks of at most \(14, 14\) for shape .*got \(15, 1\)"
    ):
        lowrank.apply(nn.Sequential(table()), plan.edit({"0": (15, 1)}), data=None)


def test_what_a_train_cannot_keep_is_refused() -> None:
    padded = table(padding_idx=4)
    with torch.no_grad():
        padded.weight[4] = 1
    for model, said in (
        (nn.Sequential(padded), "row 4 of the table is its padding_idx and not zero"),
        (make("gpt2"), r"transformer.wte is tied to an output head.*exclude_modules="),
    ):
        with pytest.raises(LowrankError, match=said):
            lowrank.compress(model, 0.5, method="tensor-train", target_modules="all")
    with pytest.raises(LowrankError, match="unknown start 'cold'"):
        TensorTrain(start="cold")
