"""New tokens: what is mixed from what, for every kind of table and head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Extension, LowrankError, extend_vocabulary
from lowrank.nn import LowRankEmbedding, LowRankLinear, TiedHead
from tests.vocabularies import NEW, logits, model_of, tokenizer
from tests.zoo import VOCABULARY, make, tokens

KINDS = ["tied", "untied", "bert", "t5", "dense tied", "dense untied"]
PARTS = [["hat", "##b", "##e", "##d"], ["sat", "##er"]]


def ends(model: Any) -> list[Tensor]:
    """The dense rows of the embedding and of the head, and the biases of that."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    bias = getattr(head.up if isinstance(head, LowRankLinear) else head, "bias", None)
    found = [table.weight.clone(), head.weight.clone(), bias]
    return [tensor.detach().double() for tensor in found if tensor is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_are_means_of_subwords_and_old_logits_stay(kind: str) -> None:
    model, words = model_of(kind), tokenizer()
    before, old = logits(model, tokens(2, 6)), ends(model)
    basis = {n: p.clone() for n, p in model.named_parameters() if "rows" not in n}
    done = extend_vocabulary(model, words, NEW[:2])
    assert done.ids == [VOCABULARY, VOCABULARY + 1] == words.convert_tokens_to_ids(NEW[:2])
    assert done.rows == (VOCABULARY, VOCABULARY + 2)
    assert model.config.vocab_size == VOCABULARY + 2
    after = ends(model)
    assert len(after) == (3 if kind == "bert" else 2)
    for had, has in zip(old, after, strict=True):
        torch.testing.assert_close(has[:VOCABULARY], had)
        for place, parts in enumerate(PARTS):
            ids = tokenizer().convert_tokens_to_ids(parts)
            torch.testing.assert_close(has[VOCABULARY + place], had[ids].mean(0))
    torch.testing.assert_close(logits(model, tokens(2, 6))[..., :VOCABULARY], before)
    if kind == "tied":  # of a factored table, coordinates alone
        table = model.get_input_embeddings()
        assert isinstance(table, LowRankEmbedding)
        assert isinstance(model.lm_head, TiedHead)
        assert done.numbers == 2 * table.rank
        assert all(torch.equal(p, basis[n]) for n, p in model.named_parameters() if n in basis)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_it_commutes_with_merging_and_with_cutting_ranks(kind: str) -> None:
    first, then = model_of(kind), lowrank.to_dense(model_of(kind), copy=True)
    extend_vocabulary(first, tokenizer(), NEW[:2])
    extend_vocabulary(then, tokenizer(), NEW[:2])
    ids = tokens(2, 6) + 2
    torch.testing.assert_close(logits(lowrank.to_dense(first, copy=True), ids), logits(then, ids))
    cut, _ = lowrank.at_rank(model_of(kind), 0.4)
    extend_vocabulary(cut, tokenizer(), NEW[:2])
    torch.testing.assert_close(logits(lowrank.at_rank(first, 0.4)[0], ids), logits(cut, ids))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_it_is_saved_and_loaded_with_its_tokenizer(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, words = model_of(kind), tokenizer()
    done = extend_vocabulary(model, words, NEW[:2])
    lowrank.save(model, tmp_path, tokenizer=words)
    again, read = lowrank.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    ids = read("the hatbed sater", add_special_tokens=False)["input_ids"]
    assert ids[1:] == done.ids
    assert torch.equal(logits(again, torch.tensor([ids])), logits(model, torch.tensor([ids])))
    more = extend_vocabulary(again, read, ["reder"])  # and on from there
    assert more.ids == [VOCABULARY + 2]
    again.save_pretrained(tmp_path)
    last, ids = lowrank.from_pretrained(tmp_path).eval(), torch.tensor([more.ids])
    assert torch.equal(logits(last, ids), logits(again, ids))


def test_similar_tokens_are_named_in_lists_or_by_cosines() -> None:
    model = model_of("tied")
    rows = model.model.embed_tokens.rows.weight.detach().clone().double().numpy()
    cat, dog, hat = tokenizer().convert_tokens_to_ids(["cat", "dog", "hat"])
    similar = {"kitten": ["cat", cat, "dog"], "hound": {"dog": 0.9, hat: 0.7, "cathat": 0.1}}
    done = extend_vocabulary(model, tokenizer(), ["kitten", "hound", *NEW[:1]], similar=similar)
    new = model.model.embed_tokens.rows.weight.detach()[VOCABULARY:].double().numpy()
    np.testing.assert_allclose(new[0], (2 * rows[cat] + rows[dog]) / 3, rtol=1e-5)
    weight = np.exp(np.array([9.0, 7.0, 1.0]))
    weight /= weight.sum()
    pieces = tokenizer()("cathat", add_special_tokens=False)["input_ids"]
    parts = np.stack([rows[dog], rows[hat], rows[pieces].mean(0)])
    np.testing.assert_allclose(new[1], weight @ parts, rtol=1e-5)
    assert done.start == "similar"
    assert set(done.tokens[2].like) == set(PARTS[0])  # what is not named starts from its subwords
    assert "'kitten'" in str(done)


def test_the_mean_and_draws_are_of_tokens_not_of_spare_rows() -> None:
    model, words = model_of("untied"), tokenizer(spare=4)
    with torch.no_grad():
        model.model.embed_tokens.rows.weight[-4:] = 1e6
    had = model.model.embed_tokens.rows.weight.detach().clone()
    state = torch.random.get_rng_state()
    done = extend_vocabulary(model, words, NEW[:2], similar="mean")
    rows = model.model.embed_tokens.rows.weight.detach()
    assert done.rows == (VOCABULARY, VOCABULARY)  # they took spare ones
    assert done.ids == [VOCABULARY - 4, VOCABULARY - 3]
    torch.testing.assert_close(rows[done.ids], had[:-4].mean(0).expand(2, -1))
    assert torch.equal(rows[-2:], had[-2:])
    assert done.drawn == ()
    found = []
    for seed in (1, 1, 2):
        drawn, words = model_of("untied"), tokenizer()
        done = extend_vocabulary(drawn, words, NEW[:2], similar="random", seed=seed)
        found.append(drawn.model.embed_tokens.rows.weight.detach()[done.ids])
        assert done.drawn == tuple(NEW[:2])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_texts_without_a_known_subword_are_drawn_and_named() -> None:
    done = extend_vocabulary(model_of("tied"), tokenizer(), NEW)
    assert done.drawn == ("zzz",)
    assert "none: drawn" in str(done)
    many = Extension((*done.tokens, *done.tokens * 6), (61, 82), 9, "subwords")
    assert str(many).endswith("… (+1 more)")


def test_rows_for_padding_are_the_mean() -> None:
    model = model_of("tied")
    done = extend_vocabulary(model, tokenizer(), NEW[:2], pad_to_multiple_of=16)
    rows = model.model.embed_tokens.rows.weight.detach()
    assert done.rows == (VOCABULARY, len(rows)) == (VOCABULARY, 64)
    torch.testing.assert_close(rows[63], rows[:VOCABULARY].mean(0))


def test_other_tables_of_that_length_are_named() -> None:
    model = model_of("tied")
    model.add_module("other", nn.Embedding(VOCABULARY, 3))
    done = extend_vocabulary(model, tokenizer(), NEW[:2])
    assert done.untouched == ("other",)
    assert "left as they are: other" in str(done)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"new_tokens": ["cat", "hatbed"]}, r"1 of 2 tokens are in the vocabulary already \('cat'\)"),
    ({"new_tokens": ["hatbed", "hatbed"]}, "each once, got 'hatbed' again"),
    ({"new_tokens": []}, "must be texts"),
    ({"new_tokens": "hatbed"}, "expected a list of texts, got the text 'hatbed'"),
    ({"similar": "subword"}, "unknown similar 'subword'; did you mean 'subwords'"),
    ({"similar": {"dogs": ["dog"]}}, "similar names no new token: 'dogs'"),
    ({"similar": {"hatbed": ["zz"]}}, "'zz', which is no token of the model, for 'hatbed'"),
    ({"similar": {"hatbed": [VOCABULARY]}}, "61, which is no token of the model"),
    ({"similar": {"hatbed": []}}, "no old token for 'hatbed'"),
    ({"tokenizer": print}, "expected a tokenizer of transformers, got builtin_function"),
    ({"model": nn.Linear(3, 3)}, "a Linear does not say where its tokens are"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_what_cannot_be_is_said_and_nothing_is_changed(wrong: dict[str, Any], said: str) -> None:
    model, words = model_of("tied"), tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LowrankError, match=said):
        extend_vocabulary(**{"model": model, "tokenizer": words, "new_tokens": NEW[:1], **wrong})
    assert len(words) == VOCABULARY
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_a_token_that_the_normaliser_makes_another_one_is_refused() -> None:
    from tokenizers import AddedToken, normalizers

    words = tokenizer()
    words.backend_tokenizer.normalizer = normalizers.Lowercase()
    exact = AddedToken("Cat", normalized=False)
    done = extend_vocabulary(model_of("tied"), copy.deepcopy(words), [exact, "HatBed"])
    assert [token.text for token in done.tokens] == ["Cat", "HatBed"]
    with pytest.raises(LowrankError, match=r"1 of 2 tokens are in .* already \('Cat'\)"):
        extend_vocabulary(model_of("tied"), words, [AddedToken("Cat", normalized=True), "HatBed"])
    assert len(words) == VOCABULARY


def test_a_tokenizer_that_takes_no_tokens_is_refused() -> None:
    words, model = tokenizer(), model_of("tied")
    words.add_tokens = lambda tokens: 0
    with pytest.raises(LowrankError, match="does not find 'hatbed' as one token"):
        extend_vocabulary(model, words, NEW[:1])
    assert model.config.vocab_size == VOCABULARY


def test_a_model_that_cannot_grow_leaves_the_tokenizer_as_it_was() -> None:
    class Own(nn.Embedding):
        pass

    model, words = model_of("tied"), tokenizer()
    rows = model.model.embed_tokens.rows
    model.model.embed_tokens.rows = Own(*rows.weight.shape)
    with pytest.raises(LowrankError, match="LowRankEmbedding cannot be resized"):
        extend_vocabulary(model, words, NEW[:1])
    assert len(words) == VOCABULARY == model.config.vocab_size


def test_forms_without_a_row_for_every_token_say_what_to_do() -> None:
    options: dict[str, Any] = {"data": None, "progress": False}
    pivoted, _ = lowrank.compress(
        make("llama"), 0.6, target_modules=["lm_head"], storage="pivoted", **options
    )
    with pytest.raises(LowrankError, match=r"PivotedLinear has no row .*storage=\"factors\""):
        extend_vocabulary(pivoted, tokenizer(), NEW[:1])
    assert pivoted.config.vocab_size == len(pivoted.model.embed_tokens.weight) == VOCABULARY
