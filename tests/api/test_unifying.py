"""One table for the embeddings of a model: budget, files, merging, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, Report
from lowrank.nn import UnifiedEmbedding, UnifiedReader
from tests.zoo import make, unchanged


class Net(nn.Module):
    """Two features and a bag, of two widths, and a layer over them."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(300, 8, padding_idx=0)
        self.item = nn.Embedding(100, 4)
        self.tags = nn.EmbeddingBag(50, 4, mode="max")
        self.top = nn.Linear(16, 3)
        with torch.no_grad():
            for table in (self.user, self.item, self.tags):
                table.weight *= 0.1

    def forward(self, ids: Tensor) -> Tensor:
        found = (self.user(ids[:, 0]), self.item(ids[:, 1]), self.tags(ids[:, 2:]))
        return self.top(torch.cat(found, 1))  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


IDS = torch.randint(1, 50, (64, 5), generator=torch.Generator().manual_seed(1))


def test_one_table_has_the_budget_and_the_scale() -> None:
    model, report = lowrank.unify_tables(net(), 0.25)
    assert [type(layer) for layer in model.children()] == [
        UnifiedEmbedding, UnifiedReader, UnifiedReader, nn.Linear,
    ]  # fmt: skip
    assert model.user.shared.weight.shape == (3000 // 4 // 2, 2)
    assert (model.user.lookups, model.item.lookups) == (4, 2)
    assert report.achieved == pytest.approx(0.25)
    assert report.params_after == sum(p.numel() for p in model.parameters()) == 750 + 51
    assert float(model.user.shared.weight.detach().std()) == pytest.approx(0.1, rel=0.1)
    assert torch.equal(model.user(torch.tensor([0])), torch.zeros(1, 8))
    rows = [model.item(torch.tensor([7])), model.tags(torch.tensor([[7]]))]
    assert not torch.equal(*rows)  # a feature's hashes are its own
    assert Report.from_json(report.to_json()) == report
    assert "unified" in str(report)


def test_seed_lookups_and_copy_are_used() -> None:
    model = net()
    with unchanged(model):
        found = [
            lowrank.unify_tables(model, 0.25, copy=True, **options)[0](IDS)
            for options in ({}, {}, {"seed": 1}, {"lookups": 1})
        ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_trained_copied_saved_and_merged(tmp_path: Path) -> None:
    model, _ = lowrank.unify_tables(net(), 0.25)
    labels = torch.arange(64) % 3
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.05), []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(IDS), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    other = copy.deepcopy(model)
    assert other.item.owner is other.user
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, net())
    assert again.tags.owner is again.user
    assert torch.equal(again(IDS), model(IDS))
    merged = lowrank.to_dense(again)
    assert [type(layer) for layer in merged.children()] == [type(m) for m in net().children()]
    torch.testing.assert_close(merged(IDS), model(IDS))


def test_named_tables_only_and_the_rest_as_it_was() -> None:
    model, report = lowrank.unify_tables(net(), 0.5, target_modules=["item", "tags"])
    assert type(model.user) is nn.Embedding
    assert [entry.target for entry in report.plan.entries] == [False, True, True, False]
    assert model.item.shared.weight.shape == (600 // 2 // 2, 2)


def changed(**attributes: Any) -> Net:
    model = net()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (net, {"ratio": 1.5}, "ratio is the fraction kept"),
        (net, {"ratio": 1e-4}, r"ratio=0.0001 of 3,000 numbers leaves no row of 2"),
        (net, {"lookups": 3}, "lookups must divide the width of the narrowest embedding, 4, got 3"),
        (net, {"seed": -1}, "seed >= 0, got 2, -1"),
        (net, {"target_modules": ["top"]}, "no embedding can share a table: user: not in target"),
        (lambda: changed(tags=nn.EmbeddingBag(50, 5)), {}, "tags is 5 wide, no multiple of the 2"),
        (lambda: changed(tags=nn.EmbeddingBag(50, 4, sparse=True)), {},
         "item and tags cannot share a table"),
        (lambda: nn.Embedding(50, 4), {}, "the model is one embedding"),
        (lambda: make("gpt2"), {}, "transformer.wte is tied to an output head"),
    ],
)  # fmt: skip
def test_it_refuses_before_anything_is_changed(model: Any, options: Any, said: str) -> None:
    given = model()
    with unchanged(given), pytest.raises(LowrankError, match=said):
        lowrank.unify_tables(given, **{"ratio": 0.5, **options})
