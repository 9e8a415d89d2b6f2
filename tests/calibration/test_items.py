"""Single items: what is a batch, what is a text, what is refused by its place and type."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank import LowrankError
from lowrank.calibration.items import batch_of, is_dataclass, text_of
from tests.zoo import said


def test_flat_lists_of_a_row_become_tensors() -> None:
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 0], "labels": [-100, 6, 7], "id": "a"}
    batch: Any = batch_of(row)
    assert batch["input_ids"].tolist() == [[5, 6, 7]]
    assert batch["input_ids"].dtype == torch.long
    assert batch["attention_mask"].tolist() == [[1, 1, 0]]
    assert batch["labels"].shape == (1, 3)
    assert batch["id"] == "a"
    features: Any = batch_of({"x": [0.5, 1.5]})
    assert features["x"].tolist() == [0.5, 1.5]
    assert row["input_ids"] == [5, 6, 7]


@pytest.mark.parametrize(
    ("item", "kind"),
    [(None, "NoneType"), ({1, 2}, "set"), (object(), "object"), ("a", "str"), ([], "list")],
)
def test_what_is_no_batch_is_refused_with_place_and_type(item: Any, kind: str) -> None:
    with pytest.raises(LowrankError, match=rf"^item 7 of the data: .*got {kind}$") as caught:
        batch_of(item, 7)
    said(caught)


@pytest.mark.parametrize(
    "row", [{"input_ids": [[1, 2], [3]]}, {"n": None}, {"n": []}, {"a": ["b"]}]
)
def test_rows_without_numbers_are_refused(row: Any) -> None:
    with pytest.raises(LowrankError, match="item 0 of the data: a batch that is a dict must hold"):
        batch_of(row, 0)


def test_the_text_of_a_row() -> None:
    assert text_of({"text": "a b", "url": "c"}) == "a b"
    assert text_of({"content": "a b"}) == "a b"
    assert text_of({"question": "a", "answer": "b"}) is None  # which of them?
    assert text_of({"text": "a b", "input_ids": [1, 2]}) is None  # tokenised already
    assert text_of({"text": ["a", "b"]}) is None
    assert text_of({}) is None


def test_a_class_is_no_dataclass_of_inputs() -> None:
    from tests.calibration.test_batches import Inputs

    assert is_dataclass(Inputs(torch.ones(1)))
    assert not is_dataclass(Inputs)
