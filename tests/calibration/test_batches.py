"""Data in the forms that people have, and what a model is given of it."""

from __future__ import annotations

from collections import UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowrank import LowrankError
from lowrank.calibration.batches import materialise, parted, rebatched, text_batches, text_rows
from lowrank.calibration.running import forward, logits_of, mask_of
from tests.zoo import Custom, Tokenizer, make, said, tokens

X = torch.arange(12.0).reshape(4, 3)
ROWS = list(X)


def recorder() -> Custom:
    """A model that gives back what it was given."""
    return Custom(lambda self, *args, **kwargs: (args, kwargs), fc=nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("data", "batches"),
    [
        (X, [X]),
        (ROWS, ROWS),
        (tuple(ROWS), ROWS),
        ((row for row in ROWS), ROWS),
        ([(row, 1) for row in ROWS], ROWS),
        ([[row, "label"] for row in ROWS], ROWS),
        (DataLoader(TensorDataset(X), batch_size=2), [X[:2], X[2:]]),
        (DataLoader(TensorDataset(X, X[:, 0]), batch_size=3), [X[:3], X[3:]]),
        ({"x": X, "n": 1}, [{"x": X, "n": 1}]),
        (UserDict(x=X), [{"x": X}]),  # what a BatchEncoding is
        ([{"x": X}, {"x": X + 1}], [{"x": X}, {"x": X + 1}]),
        (DataLoader([{"x": row} for row in ROWS], batch_size=4), [{"x": X}]),
    ],
)
def test_every_form_gives_the_same_batches(data: Any, batches: list[Any]) -> None:
    got = materialise(data)
    assert isinstance(got, list)
    assert len(got) == len(batches)
    for mine, other in zip(got, batches, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_a_tokenizers_output_is_a_batch() -> None:
    from transformers import BatchEncoding

    got = materialise(BatchEncoding({"input_ids": tokens(), "attention_mask": tokens() > 0}))
    assert [sorted(batch) for batch in got] == [["attention_mask", "input_ids"]]


def test_a_callable_is_kept_as_it_is() -> None:
    run = lambda model: model(X)  # noqa: E731
    assert materialise(run) is run


def test_texts_are_cut_into_rows_and_nothing_is_lost_or_padded() -> None:
    texts = ["abcdefgh", "ij", "klmno", "pqrst", ""]
    batches = materialise(texts, Tokenizer(), length=5)
    assert [tuple(batch.shape) for batch in batches] == [(3, 5), (1, 3), (1, 2)]
    got = sorted(tuple(row.tolist()) for batch in batches for row in batch)
    rows = ["abcde", "fgh", "ij", "klmno", "pqrst"]
    assert got == sorted(tuple(Tokenizer()(row)["input_ids"]) for row in rows)
    (one,) = materialise("abcdefgh", Tokenizer(), length=8)
    assert one.dtype == torch.long


def test_batches_of_texts_have_at_most_sixteen_rows() -> None:
    sizes = [len(batch) for batch in text_batches("ab" * 20, Tokenizer(), 1)]
    assert sizes == [16, 16, 8]


def test_rows_of_a_text() -> None:
    assert [row.tolist() for row in text_rows("abc", Tokenizer(), 2)] == [[40, 41], [42]]
    assert text_rows("", Tokenizer(), 2) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "gave no batch: an empty list, or an exhausted iterator?"),
        pytest.param(iter([]), "gave no batch", id="spent"),
        (["text"], "texts need a tokenizer"),
        ("text", "texts need a tokenizer"),
        (5, "got int"),
        (None, "got NoneType"),
        ([5], "a tuple that starts with a tensor, got int"),
        ([("text", 1)], "got tuple"),
        ([X, "text"], "got str"),
        ([[]], "got list"),
        ([{"input_ids": [1, 2]}], "got {input_ids: list}: collate the rows"),
        ({}, "must hold tensors, got {}"),
    ],
    ids=str,
)
def test_what_is_no_data_is_told(data: Any, words: str) -> None:
    with pytest.raises(LowrankError) as caught:
        materialise(data)
    assert words in said(caught)


def test_texts_without_a_token_are_told() -> None:
    with pytest.raises(LowrankError, match="contain no tokens"):
        materialise(["", ""], Tokenizer())


def test_an_exhausted_generator_is_told() -> None:
    rows = (row for row in ROWS)
    assert len(materialise(rows)) == 4
    with pytest.raises(LowrankError, match="exhausted"):
        materialise(rows)


# What the model is given


def test_tensors_go_in_by_position_and_dicts_by_name() -> None:
    args, kwargs = forward(recorder(), X)
    assert args[0] is X
    assert kwargs == {}
    args, kwargs = forward(recorder(), {"x": X, "flag": True, "labels": X})
    assert args == ()
    assert kwargs.keys() == {"x", "flag"}  # labels would only cost a loss


def test_labels_make_the_input_of_a_decoder() -> None:
    model, labels = make("t5"), tokens(2, 5)
    got = forward(model, {"input_ids": tokens(), "labels": labels})
    assert got.loss is None
    expected = model(input_ids=tokens(), labels=labels).logits
    torch.testing.assert_close(got.logits, expected, rtol=0, atol=0)
    given = {"input_ids": tokens(), "labels": labels, "decoder_input_ids": tokens(2, 3)}
    assert forward(model, given).logits.shape[:2] == (2, 3)


def test_batches_go_to_the_models_device() -> None:
    meta = Custom(lambda self, x, **more: (x, more), fc=nn.Linear(1, 1, device="meta"))
    x, _ = forward(meta, X)
    assert x.is_meta
    x, more = forward(meta, {"x": X, "n": 2})
    assert x.is_meta
    assert more == {"n": 2}
    assert forward(nn.Identity(), X) is X  # no parameters


# What a model gives back


def test_logits_of_what_models_return() -> None:
    from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

    pair = namedtuple("pair", ["loss", "logits"])(X.sum(), X)
    own = SimpleNamespace(logits=X)
    for output in (X, (X, 1), {"logits": X}, CausalLMOutput(loss=X.sum(), logits=X), pair, own):
        assert logits_of(output) is X
    for bad in ((), (1, X), {"hidden": X}, None, BaseModelOutput(X), SimpleNamespace(), "logits"):
        with pytest.raises(LowrankError, match=f"expected logits.*{type(bad).__name__}"):
            logits_of(bad)


def test_masks() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def of(batch: Any) -> Tensor | None:
        return mask_of(batch)

    assert torch.equal(of({"x": X, "attention_mask": mask}), mask.bool())
    assert of({"x": X, "attention_mask": torch.ones(2, 3)}) is None  # nothing is padded
    assert of({"x": X, "attention_mask": None}) is None
    assert of({"x": X}) is None
    assert of(X) is None


@pytest.mark.parametrize(
    ("batches", "sizes"),
    [
        ([tokens(20)], [16, 4]),
        ([tokens(3), tokens(3, 5), tokens(2, 5)], [3, 5]),
        ([{"input_ids": tokens(20), "labels": torch.arange(20)}], [16, 4]),
        ([{"x": tokens(2)}, {"x": tokens(2), "y": tokens(2)}], [2, 2]),
        ([{"x": tokens(2), "flag": True}] * 2, [2, 2]),  # cannot be cut, nor joined
        ([torch.ones(24)] * 3, [24, 24, 24]),  # inputs without an axis of rows
        ([torch.ones(1)] * 3, [1, 1, 1]),
    ],
    ids=str,
)
def test_parted_rows_are_in_batches_again(batches: list[Any], sizes: list[int]) -> None:
    """Left in single rows, each would be a gradient step. Nothing is lost, none is reordered."""
    data = [*batches, {"held": tokens(1)}]
    rows = rebatched(data, 1)
    kept, held = parted(data, 1 / len(rows))
    assert [list(batch) for batch in held] == [["held"]]
    firsts = [b if isinstance(b, Tensor) else next(iter(b.values())) for b in kept]
    assert [len(first) for first in firsts] == sizes
    again = rebatched([*kept, *held], 1)
    assert len(again) == len(rows)
    for mine, theirs in zip(again, rows, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
