"""DNIS: gates find the planted dimensions, the budget is kept, and nothing is lost on the way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.nn import BlockEmbedding, LowRankEmbedding
from lowrank.train import DNIS
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import same, snapshot
from tests.zoo import make, tokens

ROWS, WIDTH = 120, 6
COUNTS = torch.arange(ROWS).flip(0)  # the last ids are read least


class Tables(nn.Module):
    """Two tables, one of them pooled."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Embedding(ROWS, WIDTH, **options)
        self.bag = nn.EmbeddingBag(40, WIDTH, mode="mean", padding_idx=0)
        self.top = nn.Linear(2 * WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(torch.cat([self.one(ids), self.bag(ids[:, None] % 40)], 1))


def loss_of(model: nn.Module, step: int) -> Tensor:
    rng = torch.Generator().manual_seed(step)
    ids = (torch.rand(32, generator=rng) ** 2 * ROWS).long()
    return nn.functional.cross_entropy(model(ids), ids % 3)


def adam(model: nn.Module) -> Any:
    return torch.optim.Adam(model.parameters(), lr=0.02)


def train(model: Any, live: Any, controller: Any, steps: int, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, steps):
        live.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        controller.before_step()
        live.step()
        controller.after_step()
        losses.append(loss.item())
    return losses


def made(seed: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    model = Tables(seed)
    live = adam(model)
    settings = {"ratio": 0.4, "search": 12, "blocks": 4, **options}
    return model, live, DNIS(model, live, **settings)


def numbers(model: Tables) -> int:
    return sum(p.numel() for part in (model.one, model.bag) for p in part.parameters())


def test_it_begins_with_the_same_function() -> None:
    model, live, controller = made()
    assert torch.equal(loss_of(model, 0), loss_of(Tables(), 0))
    check_same_parameters(live, model)
    assert {n: tuple(g.shape) for n, g in controller.gates.items()} == {
        "one": (4, 6),
        "bag": (4, 6),
    }
    assert model.one.lengths == [8, 16, 32, 64]
    assert controller.ranks == {"one": [6] * 4, "bag": [6] * 4}


def test_the_budget_is_kept_and_used() -> None:
    """Maps included; the choice is that of the largest |α e|."""
    model, live, controller = made(search=10)
    train(model, live, controller, 9)
    sizes = {name: getattr(model, name).sizes() for name in ("one", "bag")}
    train(model, live, controller, 10, start=9)
    limit = 0.4 * (ROWS + 40) * WIDTH
    assert 0.9 * limit < numbers(model) <= limit
    check_same_parameters(live, model)
    assert all(size.shape == (4, WIDTH) for size in sizes.values())
    events = [event for event in controller.history if event["event"] == "prune"]
    assert [event["site"] for event in events] == ["one", "bag"]
    assert controller.ranks == {event["site"]: event["rank"] for event in events}
    train(model, live, controller, 20, start=10)
    assert controller.finish() is model
    assert isinstance(model.one, BlockEmbedding | LowRankEmbedding)


def test_what_is_kept_computes_what_the_gates_did() -> None:
    """Dimensions that were left out are zero, the others unchanged."""
    model, live, controller = made(search=10, ratio=0.6)
    train(model, live, controller, 9)
    torch.manual_seed(4)
    with torch.no_grad():
        model.one.gates.mul_(torch.rand(4, WIDTH) * 2)
    gated = {name: getattr(model, name).dense_weight().detach() for name in ("one", "bag")}
    blocks = {name: getattr(model, name).block.long() for name in gated}
    sizes = {name: getattr(model, name).sizes() for name in gated}
    controller._prune()
    for name, before in gated.items():
        kept = torch.zeros(4, WIDTH, dtype=torch.bool)
        for block, dimensions in enumerate(controller._kept[name]):
            kept[block, dimensions] = True
        after = getattr(model, name).dense_weight().detach()
        torch.testing.assert_close(after, before * kept[blocks[name]], rtol=1e-6, atol=0)
        assert 0 < int(kept.sum()) < kept.numel()
        for size, mask in zip(sizes[name], kept, strict=True):  # of a block the largest
            assert set(size.argsort(descending=True)[: int(mask.sum())].tolist()) == set(
                mask.nonzero().flatten().tolist()
            )


@pytest.mark.parametrize("mixed", [False, True], ids=["in order", "by counts"])
def test_gates_find_the_dimensions_that_are_planted(mixed: bool) -> None:
    """The first 8 rows need all, the others the second alone; in order of the ids, or by counts."""
    target = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(8))
    target[8:, torch.arange(WIDTH) != 1] = 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(ROWS, WIDTH))
    live = torch.optim.Adam(model.parameters(), lr=0.1)
    places = torch.randperm(ROWS) if mixed else torch.arange(ROWS)  # of an id, by frequency
    counts = {"0": ROWS - places} if mixed else None
    need = 8 * WIDTH + 112 + 3 * WIDTH  # before neighbours are joined
    controller = DNIS(
        model, live, ratio=(need + 1) / (ROWS * WIDTH), search=80, blocks=4, lasso=1e-3,
        counts=counts,
    )  # fmt: skip
    ids = places.argsort()
    for _ in range(100):
        live.zero_grad()
        (model[0](ids) - target).square().mean().mul(50).backward()
        controller.before_step()
        live.step()
        controller.after_step()
    model = controller.finish()
    assert controller.attachment.history[-1]["rank"] == [6, 1, 1, 1]
    layer = model[0]
    assert isinstance(layer, BlockEmbedding)
    assert (layer.lengths, layer.widths) == ((8, 112), (6, 1))  # neighbours that keep the same
    assert (layer.order is None) == (not mixed)
    assert float((model[0](ids) - target).detach().square().mean()) < 1e-3


def test_gates_learn_from_held_out_batches_and_rows_do_not() -> None:
    asked: list[int] = []

    def validate(model: nn.Module) -> Tensor:
        asked.append(1)
        return sum(m.dense_weight()[:, :3].square().sum() for m in (model.one, model.bag))

    model, live, controller = made(validate=validate, every=3, lasso=0.0)
    plain, other, alone = made(lasso=0.0)
    train(model, live, controller, 1)
    moved = 1 - model.one.gates.detach()
    assert bool((moved[:, :3] > 0.01).all())  # Adam's first step is its rate
    assert not moved[:, 3:].any()
    train(plain, other, alone, 1)
    assert torch.equal(model.one.rows.weight, plain.one.rows.weight)
    assert not torch.equal(plain.one.gates[:, 3:], model.one.gates[:, 3:])
    train(model, live, controller, 7, start=1)
    assert len(asked) == 3  # in steps 0, 3 and 6


def test_the_lasso_pulls_gates_to_zero() -> None:
    found = {}
    for lasso in (0.0, 0.5):
        model, live, controller = made(search=40, lasso=lasso)
        train(model, live, controller, 30)
        found[lasso] = float(controller.gates["one"].abs().mean())
    assert found[0.5] < 0.9 * found[0.0]


def test_one_block_ends_as_low_rank_and_a_whole_table_dense(tmp_path: Path) -> None:
    model, live, controller = made(blocks=1, target_modules=["bag"], ratio=0.7)
    train(model, live, controller, 14)
    model = controller.finish()
    assert isinstance(model.bag, LowRankEmbedding)
    assert model.bag.options() == {"padding_idx": 0, "mode": "mean"}
    assert type(model.one) is nn.Embedding
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, Tables(seed=3))
    assert torch.equal(again(torch.arange(40)), model(torch.arange(40)))
    flat = nn.Sequential(nn.Embedding(500, 2), nn.Linear(2, 2))
    with torch.no_grad():
        flat[0].weight[:, 1] *= 10
    whole = DNIS(flat, adam(flat), ratio=0.999, search=1, blocks=1)
    whole.finish()
    assert flat[0].rank == 1
    check_same_parameters(whole.attachment.optimizer, flat)


def test_blocks_are_saved_loaded_and_merged(tmp_path: Path) -> None:
    model, live, controller = made(counts={"one": COUNTS.roll(7)})
    train(model, live, controller, 14)
    model = controller.finish().eval()
    assert isinstance(model.one, BlockEmbedding)
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, Tables(seed=3)).eval()
    ids = torch.arange(ROWS)
    assert torch.equal(again(ids), model(ids))
    torch.testing.assert_close(lowrank.to_dense(again)(ids), model(ids))


@pytest.mark.parametrize("stop", [5, 16])
def test_resumed_it_is_the_unbroken_run(stop: int) -> None:
    """Before the choice and after it; the model starts from other numbers."""
    model, live, controller = made()
    unbroken = train(model, live, controller, 22)
    final = copy.deepcopy(model.state_dict())
    model, live, controller = made()
    first = train(model, live, controller, stop)
    state = copy.deepcopy((model.state_dict(), live.state_dict()))
    kept = json.loads(json.dumps(controller.state_dict()))
    again, other, second = made(seed=5)
    second.load_state_dict(kept)
    assert second.state_dict() == kept
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    assert [*first, *train(again, other, second, 22, start=stop)] == unbroken
    assert all(torch.equal(final[key], value) for key, value in again.state_dict().items())
    if stop > 12:
        with pytest.raises(LowrankError, match="not chosen in this state, but here they are"):
            second.load_state_dict(made()[2].state_dict())


def test_sparse_gradients_work_and_one_that_is_not_finite_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(50, 4, sparse=True))
    live = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = DNIS(model, live, ratio=0.5, search=3)
    for step in range(4):
        live.zero_grad()
        model(torch.tensor([step, 49])).square().sum().backward()
        controller.before_step()
        live.step()
        controller.after_step()
    assert controller.pruned
    live.zero_grad()
    (model(torch.arange(50)).sum() * float("nan")).backward()
    with pytest.raises(LowrankError, match="not finite"):
        controller.before_step()


PADDED = nn.Embedding(ROWS, WIDTH, padding_idx=1)
with torch.no_grad():
    PADDED.weight[1] = 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 1.0}, r"ratio is the share kept, in \(0, 1\), got 1.0"),
        ({"search": 0}, "need search, blocks, every >= 1"),
        ({"blocks": 0}, "need search, blocks, every >= 1"),
        ({"lasso": -1.0}, "and lasso >= 0"),
        ({"counts": {"two": COUNTS}}, "counts of two, which are no tables here"),
        ({"counts": {"one": COUNTS[1:]}}, r"counts of one must be \(120,\), got \(119,\)"),
        ({"target_modules": ["top"]}, "DNIS adapts embedding, this is linear"),
    ],
)
def test_what_is_out_of_range_changes_nothing(options: dict[str, Any], said: str) -> None:
    model = Tables()
    live = adam(model)
    before = snapshot(model, live)
    with pytest.raises(LowrankError, match=said):
        DNIS(model, live, **{"ratio": 0.5, "search": 3, **options})
    assert same(before, snapshot(model, live))
    DNIS(model, live, ratio=0.5, search=3)  # and no claim is left


def test_what_cannot_be_kept_is_said() -> None:
    model, live, controller = made(ratio=0.01)
    train(model, live, controller, 11)
    with pytest.raises(LowrankError, match=r"one dimension of 2 tables takes more .* the 9 that"):
        train(model, live, controller, 12, start=11)
    padded = Tables()
    padded.one = copy.deepcopy(PADDED)
    with pytest.raises(LowrankError, match=r"row 1 of one is its padding_idx and not zero"):
        DNIS(padded, adam(padded), ratio=0.5, search=3)


def test_the_table_of_a_language_model_is_saved_as_any_other(tmp_path: Path) -> None:
    model = make("llama")
    live = adam(model)
    controller = DNIS(model, live, ratio=0.5, search=2, target_modules=["embed_tokens"])
    ids = tokens(2, 8)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        controller.before_step()
        live.step()
        controller.after_step()
        live.zero_grad()
    model = controller.finish().eval()
    assert isinstance(model.get_input_embeddings(), BlockEmbedding)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert isinstance(again.get_input_embeddings(), BlockEmbedding)
    assert torch.equal(again(ids).logits, model(ids).logits)
