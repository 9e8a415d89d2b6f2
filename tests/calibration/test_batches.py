"""Data in the forms that people have, and what a model is given of it."""

from __future__ import annotations

import itertools
from collections import UserDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lowrank
from lowrank import LowrankError
from lowrank.calibration import batches as batches_room
from lowrank.calibration.batches import (
    first_rows,
    materialise,
    parted,
    read_rows,
    rebatched,
    rows_in,
    text_batches,
    text_rows,
)
from lowrank.calibration.padding import mask_of
from lowrank.calibration.running import forward, logits_of
from tests.zoo import Custom, Tokenizer, calibration, make, mlp, said, tokens

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
    (one,) = materialise("abc efgh", Tokenizer(), length=8)
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
        ([X, "text"], "item 1 of the data: a batch must be a tensor"),
        ([[]], "got list"),
        ([{"input_ids": [[1, 2], [3]]}], "got {input_ids: list}: collate the rows"),
        ({}, "must hold tensors, got {}"),
        ([X, X.to("meta")], "item 1 of the data: it is on the meta device"),
        (torch.zeros(1, 0), "it is empty, of shape (1, 0)"),
        ({"input_ids": torch.zeros(2, 0)}, "it is empty, of shape (2, 0)"),
    ],
    ids=str,
)
def test_what_is_no_data_is_told(data: Any, words: str) -> None:
    with pytest.raises(LowrankError) as caught:
        materialise(data)
    assert words in said(caught)


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(LowrankError, match=r"tokenizer must be one of transformers.*got 'gpt2'"):
        materialise(["a text"], "gpt2")


def test_what_a_model_takes_is_told() -> None:
    two = Custom(nn.Identity.forward)
    two.forward = lambda left, right: left  # type: ignore[method-assign]
    with pytest.raises(
        LowrankError, match=r"takes left, right, but a batch .* pass dicts, {'left'"
    ):
        forward(two, X)
    with pytest.raises(LowrankError, match=r"takes 'input', but a batch .* holds 'x', 'y'"):
        forward(nn.Linear(3, 3), {"x": X, "y": X})


def test_a_single_word_is_no_text() -> None:
    """data="wikitext" was calibrated on, as eight tokens."""
    with pytest.raises(LowrankError, match="data='wikitext' is one word, not a text") as caught:
        materialise("wikitext", Tokenizer())
    said(caught)
    with pytest.raises(LowrankError, match="one word"):
        materialise("data/text.txt", Tokenizer())
    assert len(materialise(["wikitext"], Tokenizer())) == 1  # a list of texts means what it says
    assert len(materialise("漢" * 65, Tokenizer())) == 1  # not all languages part their words


def test_a_path_is_no_text() -> None:
    path = "/a/folder/of/texts/" + "deep/" * 12 + "wiki.txt"
    with pytest.raises(LowrankError, match="is one word, not a text"):
        materialise(path, Tokenizer())


@dataclass
class Inputs:
    input_ids: Tensor
    attention_mask: Tensor | None = None
    return_dict: bool = True


def test_a_dataclass_goes_in_by_its_names() -> None:
    """Fields without a value are left to the model; transformers' own are dicts as well."""
    from transformers import BatchFeature
    from transformers.utils import ModelOutput

    ids = tokens()
    want = {"input_ids": ids, "return_dict": True}
    assert materialise(Inputs(ids)) == [want]
    assert materialise([Inputs(ids)] * 2) == [want] * 2
    assert materialise(iter([Inputs(ids, ids)])) == [{**want, "attention_mask": ids}]
    plain = {"input_ids": ids}
    assert materialise(BatchFeature(plain)) == [plain]
    assert materialise([ModelOutput(plain)]) == [plain]
    assert calibration(make("bert"), Inputs(ids)).tokens == ids.numel()


def test_a_stream_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_room, "MOST", 10)
    read = itertools.count()

    def endless() -> Iterator[Any]:
        while True:
            next(read)
            yield X

    with pytest.raises(LowrankError, match="still goes on after 10 items: pass a part") as caught:
        materialise(endless())
    said(caught)
    assert next(read) == 11
    assert len(materialise([X] * 12)) == 12  # a list has an end


class Counted:
    """An iterable that counts how many items it was asked for; sized if it has an end."""

    def __init__(self, item: Any, count: int | None = None) -> None:
        self.item, self.count, self.asked = item, count, 0

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("it has no end")
        return self.count

    def __iter__(self) -> Iterator[Any]:
        while self.count is None or self.asked < self.count:
            self.asked += 1
            yield self.item


ROW = {"input_ids": tokens()[0]}
TEXT = "abcdefgh"


@pytest.mark.parametrize("count", [None, 1000])
@pytest.mark.parametrize(
    ("item", "rows", "asked", "read"),
    [
        (X, 10, 3, 12),  # batches of 4 rows; the third is read whole
        (X, 12, 3, 12),
        (X, None, 64, 256),
        (ROW, 5, 5, 5),
        (ROW, None, 256, 256),
        (X[0], 5, 5, 5),
        (TEXT, 3, 2, 3),  # two rows of 4 tokens each
        (TEXT, None, 8192, 16384),  # 256 × 256 tokens
        ({"text": TEXT}, 4, 2, 4),
    ],
)
def test_a_stream_is_read_so_far_and_no_further(
    count: int | None, item: Any, rows: int | None, asked: int, read: int
) -> None:
    data = Counted(item, None if count is None else max(count, asked + 1))
    reading = read_rows(data, Tokenizer(), length=4, rows=rows)
    assert data.asked == asked
    assert reading.rows == read
    assert sum(map(rows_in, reading.batches)) == read  # type: ignore[arg-type]


def test_what_ends_there_does_not_go_on() -> None:
    assert read_rows(Counted(X, 3), rows=12).rows == 0
    assert read_rows(Counted(X, 64)).rows == 0
    assert read_rows([X] * 3, rows=12).rows == 0
    assert read_rows([X] * 4, rows=12).rows == 12
    assert read_rows("abc efgh", Tokenizer(), length=4, rows=2).rows == 0
    assert read_rows("abc efgh", Tokenizer(), length=4, rows=1).rows == 1


def test_what_is_in_memory_is_read_whole() -> None:
    for data in ([X] * 100, tuple([X] * 100), torch.ones(400, 3), {"x": torch.ones(400, 3)}):
        reading = read_rows(data)
        assert reading.rows == 0
        assert sum(map(rows_in, reading.batches)) == 400  # type: ignore[arg-type]


def test_a_generator_is_left_where_reading_stopped() -> None:
    rows = (x for x in range(100))
    read_rows((torch.full((1, 3), float(x)) for x in rows), rows=5)
    assert next(rows) == 5


def test_a_loader_is_read_so_far() -> None:
    loader = DataLoader(TensorDataset(torch.ones(100, 3)), batch_size=8)
    assert len(read_rows(loader, rows=20).batches) == 3  # type: ignore[arg-type]
    assert read_rows(loader).rows == 0


def test_a_calibration_has_the_rows_asked_for() -> None:
    net = nn.Linear(3, 3)
    x = torch.arange(300.0).reshape(100, 3)
    for data in (x, [x], list(x.split(30)), {"input": x}, DataLoader(x, batch_size=30)):
        seen = lowrank.calibrate(net, data, rows=40, progress=False)
        gram = x[:40].double().T @ x[:40].double() / 40
        torch.testing.assert_close(seen.statistics[""].gram, gram)
        assert seen.rows_read == 40
    assert lowrank.calibrate(net, x, rows=100, progress=False).rows_read == 0


def test_first_rows() -> None:
    assert list(map(len, first_rows([X, X, X], 6))) == [4, 2]
    assert list(map(len, first_rows([X, X], 4))) == [4]
    assert len(first_rows([X[0]] * 3, 2)) == 2  # each may be a whole input


@pytest.mark.parametrize("rows", [0, -1, 2.5, True, "5"])
def test_rows_are_a_positive_integer(rows: Any) -> None:
    with pytest.raises(LowrankError, match="rows must be a positive integer or None, got"):
        read_rows([X], rows=rows)


def test_rows_that_nothing_counts_are_refused() -> None:
    net = nn.Linear(3, 3)
    with pytest.raises(LowrankError, match="rows=5 counts rows of data, a callable shows none"):
        lowrank.calibrate(net, lambda model: model(X), rows=5, progress=False)
    seen = lowrank.calibrate(net, X, progress=False)
    with pytest.raises(LowrankError, match="rows=5 would change nothing: the calibration is fin"):
        lowrank.calibrate(net, seen, rows=5, progress=False)
    with pytest.raises(LowrankError, match="rows=5 counts rows of data, but no data is read"):
        lowrank.compress(mlp(8, 8, 8), 0.5, rows=5, data=None, progress=False)


@pytest.mark.parametrize("item", [None, {1, 2}, object(), {"x": {1}}])
def test_a_wrong_first_item_ends_the_reading(item: Any) -> None:
    data = Counted(item)
    with pytest.raises(LowrankError, match=r"^item 0 of the data: ") as caught:
        lowrank.calibrate(nn.Linear(3, 3), data, progress=False)
    assert type(item).__name__ in said(caught)
    assert data.asked == 1


def test_a_wrong_item_is_refused_before_more_are_read() -> None:
    def items() -> Iterator[Any]:
        yield 5
        raise AssertionError("it was read on")

    with pytest.raises(LowrankError, match="got int"):
        materialise(items())
    with pytest.raises(LowrankError, match="mixes texts and other items, got Tensor"):
        materialise(["text", X], Tokenizer())


def test_a_row_of_a_dataset_gets_a_batch_axis() -> None:
    """Rows of a dataset in torch format, uncollated."""
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "n": 1} for row in tokens()]
    for got, row in zip(materialise(rows), tokens(), strict=True):
        assert torch.equal(got["input_ids"], row[None])
        assert got["attention_mask"].shape == (1, 7)
        assert got["n"] == 1


def test_a_mask_in_a_tuple_is_not_dropped_untold() -> None:
    ids, mask = tokens(), torch.ones(2, 7, dtype=torch.long)
    assert torch.equal(materialise([(ids, mask)])[0], ids)  # it leaves out nothing
    assert torch.equal(materialise([(ids, ids)])[0], ids)  # labels
    mask[0, 4:] = 0
    with pytest.raises(LowrankError, match="looks like a mask: pass dicts") as caught:
        materialise([(ids, mask, ids)])
    said(caught)


def test_data_that_a_model_cannot_read_is_told_with_what_it_takes() -> None:
    net = Custom(lambda self, x, mask=None: self.fc(x), fc=nn.Linear(3, 3))
    with pytest.raises(LowrankError) as caught:
        lowrank.calibrate(net, {"x": torch.ones(2, 3), "ids": tokens()}, progress=False)
    message = said(caught)
    assert message.startswith("Custom does not run on the data: TypeError: ")
    assert message.endswith("and was given x (2, 3) float32, ids (2, 7) int64")
    with pytest.raises(LowrankError, match=r"RuntimeError: .*; it takes input, and was") as c:
        lowrank.calibrate(nn.Linear(3, 3), torch.ones(2, 5), progress=False)
    assert said(c).endswith("and was given (2, 5) float32")


@pytest.mark.parametrize("data", [nn.Linear(3, 3), nn.Linear], ids=["a model", "a class"])
def test_a_model_is_no_data(data: Any) -> None:
    with pytest.raises(LowrankError, match=r"a callable that runs it, got a (model|class)"):
        materialise(data)


def test_texts_without_a_token_are_told() -> None:
    with pytest.raises(LowrankError, match="contain no tokens"):
        materialise(["", ""], Tokenizer())


def test_an_exhausted_generator_is_told() -> None:
    rows = (row for row in ROWS)
    assert len(materialise(rows)) == 4
    with pytest.raises(LowrankError, match="exhausted"):
        materialise(rows)


# What the model is given


def test_inputs_come_in_the_models_precision() -> None:
    """NumPy's numbers are float64, the model's are not."""
    x = torch.randn(5, 6, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        model = nn.Linear(6, 3).to(dtype)
        assert forward(model, x).dtype == dtype
    named = Custom(lambda self, x: self.net(x), net=nn.Linear(6, 3))
    assert forward(named, {"x": x}).dtype == torch.float32


def test_labels_that_the_model_demands_are_given() -> None:
    class Demands(nn.Linear):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return super().forward(x) + labels

    class Ignores(nn.Linear):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            assert labels is None
            return super().forward(x)

    batch = {"x": X, "labels": torch.ones(1)}
    for kind in (Demands, Ignores):
        assert forward(kind(X.shape[1], 3), batch).shape == (len(X), 3)


def test_a_decoder_that_shifts_its_labels_itself_gets_them() -> None:
    """Whisper has no method for it."""
    tf = pytest.importorskip("transformers")
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    feed = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8}
    words = {"vocab_size": 60, "max_source_positions": 10, "max_target_positions": 12}
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = tf.WhisperConfig(
        **sizes, **heads, **feed, **words, **ends, suppress_tokens=None, begin_suppress_tokens=None
    )
    model = tf.WhisperForConditionalGeneration(config).eval()
    batch = {"input_features": torch.randn(2, 8, 20), "labels": tokens(2, 5) % 58}
    assert forward(model, batch).logits.shape == (2, 5, 60)


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
