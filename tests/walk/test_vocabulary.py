"""Which tensors hold the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.walk.vocabulary import ends_of, other_tables, rows_of, token_rows
from tests.vocabularies import model_of
from tests.zoo import VOCABULARY


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("tied", ["model.embed_tokens.rows.weight"]),
        ("untied", ["model.embed_tokens.rows.weight", "lm_head.up.weight"]),
        ("dense tied", ["model.embed_tokens.weight"]),
        ("dense untied", ["model.embed_tokens.weight", "lm_head.weight"]),
        ("bert", ["bert.embeddings.word_embeddings.rows.weight", "cls.predictions.bias"]),
        ("t5", ["shared.rows.weight"]),
    ],
)
def test_each_is_found_once(kind: str, names: list[str]) -> None:
    model = model_of(kind)
    by_id = {id(p): name for name, p in model.named_parameters()}
    rows = token_rows(model)
    assert [by_id[id(p)] for p in rows] == names
    assert {len(p) for p in rows} == {VOCABULARY}
    assert other_tables(model, rows) == []


def test_what_cannot_be_written_to_is_refused() -> None:
    model = model_of("tied")
    model.model.embed_tokens.rows = nn.Sequential(model.model.embed_tokens.rows)
    with pytest.raises(LowrankError, match="rows of LowRankEmbedding are wrapped"):
        token_rows(model)
    with pytest.raises(LowrankError, match="rows of Embedding are wrapped, quantized, sharded"):
        rows_of(nn.Embedding(4, 3, device="meta"))
    with pytest.raises(LowrankError, match="Conv1d has no row of its own"):
        rows_of(nn.Conv1d(3, 3, 1))


def test_tables_of_different_lengths_are_refused() -> None:
    model = model_of("dense untied")
    model.lm_head = nn.Linear(32, VOCABULARY + 3)
    with pytest.raises(LowrankError, match=rf"for {VOCABULARY} and {VOCABULARY + 3} tokens"):
        token_rows(model)


def test_a_model_without_tokens_is_refused() -> None:
    model = model_of("tied")
    model.get_input_embeddings = lambda: None
    with pytest.raises(LowrankError, match="has no embedding of tokens"):
        ends_of(model)
    assert torch.is_tensor(model.lm_head.weight)
