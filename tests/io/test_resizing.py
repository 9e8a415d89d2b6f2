"""Factored tables and heads take new tokens, and lose some, as dense ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.nn import (
    LowRankEmbedding,
    LowRankLinear,
    QuotientRemainderEmbedding,
    TiedHead,
)
from tests.zoo import VOCABULARY, llama, make, tokens

OLD = tokens(2, 6)


def built(kind: str) -> Any:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=kind == "tied").eval() if "tied" in kind else make(kind)
    model, _ = lowrank.compress(model, 0.6, data=None, target_modules="all", progress=False)
    assert any(isinstance(module, LowRankEmbedding) for module in model.modules())
    return model


def logits(model: Any, ids: Tensor = OLD) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("size", [VOCABULARY + 5, VOCABULARY - 1])
@pytest.mark.parametrize("kind", ["tied", "untied", "bert", "gpt2", "t5"])
def test_old_tokens_keep_their_logits(kind: str, size: int, tmp_path: Path) -> None:
    model = built(kind)
    ids, kept = OLD % (VOCABULARY - 1), min(size, VOCABULARY)
    before = logits(model, ids)
    table = model.resize_token_embeddings(size)
    assert table is model.get_input_embeddings()
    after = logits(model, ids)
    assert after.shape[-1] == size == model.config.vocab_size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    assert bool(logits(model, torch.full((1, 3), size - 1)).isfinite().all())
    assert model.get_output_embeddings().weight.shape[0] == table.weight.shape[0] == size
    model.save_pretrained(tmp_path)
    again = lowrank.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, ids), after)
    dense = lowrank.to_dense(again)
    torch.testing.assert_close(logits(dense, ids), after, rtol=1e-4, atol=1e-4)


def test_new_rows_lie_around_the_mean() -> None:
    model = built("tied")
    head, rows = model.lm_head, model.model.embed_tokens.rows
    mean = rows.weight.detach().mean(0)
    model.resize_token_embeddings(VOCABULARY + 3)
    assert isinstance(head, TiedHead)
    assert head is model.lm_head
    assert model.model.embed_tokens.rows is rows
    held = rows.weight.detach()
    assert float((held[-3:] - mean).norm(dim=1).max()) < 0.1 * float(held[:-3].norm(dim=1).mean())
    assert rows.weight.requires_grad


def test_it_is_padded_to_a_multiple_and_can_be_trained() -> None:
    model = built("tied")
    model.resize_token_embeddings(pad_to_multiple_of=8)
    assert model.config.vocab_size % 8 == 0
    batch = {"input_ids": OLD, "labels": OLD}
    model(**batch).loss.backward()
    assert model.model.embed_tokens.rows.weight.grad.shape[0] == model.config.vocab_size


def test_a_head_alone_that_has_rows_is_resized() -> None:
    model = make("llama")
    model, _ = lowrank.compress(model, 0.6, data=None, target_modules=["lm_head"])
    before = logits(model)
    model.resize_token_embeddings(VOCABULARY + 4)
    assert isinstance(model.lm_head, LowRankLinear)
    torch.testing.assert_close(logits(model)[..., :VOCABULARY], before)


def test_other_forms_say_what_to_do() -> None:
    model, _ = lowrank.compress(
        make("llama"), 0.6, data=None, target_modules=["lm_head"], storage="pivoted"
    )
    with pytest.raises(LowrankError, match=r"PivotedLinear cannot be resized: .*to_dense"):
        model.resize_token_embeddings(VOCABULARY + 4)


def test_nothing_is_resized_where_a_head_cannot_be() -> None:
    model, _ = lowrank.compress(
        make("llama"), 0.6, data=None, target_modules="all", storage="pivoted", progress=False
    )
    assert isinstance(model.model.embed_tokens, LowRankEmbedding)
    before = logits(model)
    with pytest.raises(LowrankError, match="PivotedLinear cannot be resized"):
        model.resize_token_embeddings(VOCABULARY + 4)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY
    assert torch.equal(logits(model), before)
    assert model.resize_token_embeddings() is model.model.embed_tokens  # asks for nothing


def test_what_was_frozen_stays_frozen() -> None:
    for kind in ("tied", "untied"):
        model = built(kind)
        model.model.embed_tokens.up.requires_grad_(False)
        if kind == "untied":
            model.lm_head.down.requires_grad_(False)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        model.resize_token_embeddings(VOCABULARY + 4)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_two_tables_are_saved_and_say_what_to_do(tmp_path: Path) -> None:
    model, _ = lowrank.compress(
        make("llama"), 0.6, data=None, target_modules=["embed_tokens"], method="quotient-remainder"
    )
    assert isinstance(model.model.embed_tokens, QuotientRemainderEmbedding)
    model.save_pretrained(tmp_path)
    again = lowrank.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(LowrankError, match=r"QuotientRemainderEmbedding cannot be resized: .*to_d"):
        model.resize_token_embeddings(VOCABULARY + 4)


def test_a_wrapped_table_says_so() -> None:
    model = built("tied")
    model.model.embed_tokens.rows = nn.Sequential(model.model.embed_tokens.rows)
    with pytest.raises(LowrankError, match=r"LowRankEmbedding cannot be resized: .*to_dense"):
        model.resize_token_embeddings(VOCABULARY + 4)


def test_codes_in_the_place_of_numbers_say_so() -> None:
    class Codes(Tensor):
        pass

    model = built("tied")
    rows = model.model.embed_tokens.rows
    rows.weight = nn.Parameter(rows.weight.detach().as_subclass(Codes))
    with pytest.raises(LowrankError, match=r"LowRankEmbedding cannot be resized: .*to_dense"):
        model.resize_token_embeddings(VOCABULARY + 4)
    assert type(rows.weight) is Codes
    assert len(rows.weight) == VOCABULARY


def test_dense_models_are_resized_as_ever() -> None:
    model = make("bert")
    before = logits(model)
    model.resize_token_embeddings(VOCABULARY + 4)
    torch.testing.assert_close(logits(model)[..., :VOCABULARY], before)
