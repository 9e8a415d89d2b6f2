"""Rows of a data set as `data=`.

The package `datasets` is no dependency: `Rows` and `Stream` are stand-ins that follow its protocol
(`Dataset` and `IterableDataset`), not the package itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank
from lowrank import LowrankError
from tests.zoo import Tokenizer, make, tokens

IDS = tokens(12, 9)
TEXTS = ["".join(chr(65 + (7 * row + i) % 26) for i in range(9)) for row in range(12)]


class Rows:
    """Stand-in for `datasets.Dataset`: columns of Python lists, given as tensors on request."""

    def __init__(self, columns: Mapping[str, list[Any]], kind: str | None = None) -> None:
        self._columns, self._kind = dict(columns), kind
        self.asked = 0

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def with_format(self, kind: str | None) -> Rows:
        return Rows(self._columns, kind)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key: int | slice) -> dict[str, Any]:
        return {name: self._given(values[key]) for name, values in self._columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self)):
            self.asked += 1
            yield self[index]

    def _given(self, value: Any) -> Any:
        if self._kind != "torch" or isinstance(value, str):
            return value
        if isinstance(value, list) and value and isinstance(value[0], str):
            return value
        return torch.tensor(value)


class Stream:
    """Stand-in for `datasets.IterableDataset`: dicts one after the other, here without end."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self.asked = rows, 0
        self.column_names = rows.column_names

    def with_format(self, kind: str | None) -> Stream:
        return Stream(self._rows.with_format(kind))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.asked += 1
            yield self._rows[(self.asked - 1) % len(self._rows)]


def tokenised() -> Rows:
    ids = IDS.tolist()
    return Rows({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


def written() -> Rows:
    return Rows({"text": TEXTS, "source": ["a"] * len(TEXTS)})


def factors(data: Any, **options: Any) -> dict[str, Tensor]:
    small, _ = lowrank.compress(make("llama"), 0.6, data=data, progress=False, **options)
    return small.state_dict()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def ids_of(text: str) -> list[int]:
    return Tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("kind", ["torch", None])
def test_rows_compress_as_the_tensor_of_their_ids_does(kind: str | None) -> None:
    rows = tokenised().with_format(kind)
    assert isinstance(rows[0]["input_ids"], Tensor if kind else list)
    same(factors(rows), factors(IDS))


def test_a_slice_of_tensors_is_a_batch() -> None:
    rows = tokenised().with_format("torch")
    same(factors(rows[2:8]), factors(IDS[2:8]))


def test_a_slice_of_lists_has_to_be_made_tensors() -> None:
    with pytest.raises(LowrankError, match=r"got {input_ids: list, attention_mask: list}: collate"):
        factors(tokenised()[2:8])


def test_rows_of_texts_are_tokenised() -> None:
    expected = factors(torch.tensor([ids_of(text) for text in TEXTS]))
    same(factors(written(), tokenizer=Tokenizer()), expected)
    same(factors(TEXTS, tokenizer=Tokenizer()), expected)
    with pytest.raises(LowrankError, match="texts need a tokenizer"):
        factors(written())


def test_rows_of_several_texts_without_a_telling_name_are_refused() -> None:
    rows = Rows({"question": TEXTS, "answer": TEXTS})
    with pytest.raises(LowrankError, match=r"item 0 of the data: .* got {question: str, answer"):
        factors(rows, tokenizer=Tokenizer())
    assert rows.asked == 1


@pytest.mark.parametrize("kind", ["torch", None])
def test_a_stream_of_rows_is_read_so_far(kind: str | None) -> None:
    stream = Stream(tokenised()).with_format(kind)
    same(factors(stream, rows=7), factors(IDS[:7]))
    assert stream.asked == 7


def test_a_stream_of_texts_is_read_so_far() -> None:
    stream = Stream(written())
    expected = factors(torch.tensor([ids_of(text) for text in TEXTS[:5]]))
    same(factors(stream, rows=5, tokenizer=Tokenizer()), expected)
    assert stream.asked == 5


def test_the_report_says_how_far_was_read() -> None:
    def notes(data: Any, **options: Any) -> tuple[str, ...]:
        return lowrank.compress(make("llama"), 0.6, data=data, progress=False, **options)[1].notes

    said = "the data was read to {} rows and may go on: rows=… reads more"
    assert said.format(256) in notes(Stream(tokenised()))
    assert said.format(7) in notes(tokenised(), rows=7)
    assert not any("may go on" in note for note in notes(tokenised(), rows=12))
    assert not any("may go on" in note for note in notes(tokenised()))


def test_all_verbs_read_so_far(tmp_path: Any) -> None:
    options: dict[str, Any] = {"rows": 7, "progress": False}
    streams = [Stream(tokenised()) for _ in range(4)]
    plan = lowrank.plan(make("llama"), 0.6, data=streams[0], **options)
    lowrank.apply(make("llama"), plan, data=streams[1], **options)
    lowrank.compress(make("llama"), plan, data=streams[2], **options)
    swept = lowrank.sweep(make("llama"), [0.6], data=streams[3], **options)
    assert [stream.asked for stream in streams] == [7] * 4
    assert swept.calibration is not None
    assert swept.calibration.tokens == 7 * IDS.shape[1]


def test_a_cached_sweep_knows_the_rows_again(tmp_path: Any) -> None:
    options: dict[str, Any] = {"progress": False, "cache": tmp_path / "seen.safetensors"}
    for _ in range(2):
        lowrank.sweep(make("llama"), [0.6], data=IDS, rows=7, **options)
    with pytest.raises(LowrankError, match="made from other data"):
        lowrank.sweep(make("llama"), [0.6], data=IDS, rows=6, **options)


def test_a_model_writes_as_many_rows() -> None:
    plan = lowrank.plan(make("llama"), 0.6, rows=5, progress=False)
    assert plan.settings["data"].startswith("5 rows of")
    _, report = lowrank.apply(make("llama"), plan, rows=5, progress=False)
    assert any("calibrated on 5 rows" in note for note in report.notes)
