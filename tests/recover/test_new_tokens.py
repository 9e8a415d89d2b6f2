"""Some tokens are trained, and all else stays bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW

from lowrank import LowrankError, extend_vocabulary, only_tokens
from tests.vocabularies import NEW, model_of, tokenizer
from tests.zoo import VOCABULARY


def steps(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> list[float]:
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", ["tied", "untied", "bert", "dense tied"])
def test_new_numbers_are_trained_and_nothing_else(kind: str) -> None:
    model = model_of(kind)
    done = extend_vocabulary(model, tokenizer(), NEW[:2])
    frozen = next(model.parameters()).requires_grad_(False)  # in the table: trained all the same
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with only_tokens(model, done.ids) as groups:
        optimizer = AdamW(groups, lr=0.1)  # its default decays weights
        ids = torch.tensor([[*done.ids, 3, 4, *done.ids, 5]])
        losses = steps(model, optimizer, ids)
    assert losses[-1] < losses[0]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    trained = {id(p) for group in groups for p in group["params"]}
    names = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in trained}
    assert changed == names & {*before}
    for name in changed:
        now = model.state_dict()[name]
        assert torch.equal(now[:VOCABULARY], before[name][:VOCABULARY])
        assert not torch.equal(now[VOCABULARY:], before[name][VOCABULARY:])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not frozen.requires_grad


def test_gradients_are_whole_again_afterwards_and_flags_after_an_error() -> None:
    model = model_of("tied")
    with pytest.raises(KeyError), only_tokens(model, [2]):
        raise KeyError
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.rows.weight.grad
    assert bool(gradient[3].any())
    assert all(p.grad is not None for p in model.parameters())


def test_sparse_gradients_keep_the_rows_asked_for() -> None:
    model = model_of("dense untied")
    model.model.embed_tokens.sparse = True
    table, ids = model.model.embed_tokens.weight, torch.arange(6)[None]
    before = table.detach().clone()
    with only_tokens(model, [2, 4]) as groups:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert table.grad is not None
        assert table.grad.is_sparse
        SGD(groups, lr=1.0).step()
    moved = (table.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == [2, 4]


@pytest.mark.parametrize("ids", [[], [VOCABULARY], [-1]])
def test_tokens_that_are_not_there(ids: list[int]) -> None:
    with (
        pytest.raises(LowrankError, match=rf"ids of tokens in \[0, {VOCABULARY - 1}\]"),
        only_tokens(model_of("tied"), ids),
    ):
        pass
