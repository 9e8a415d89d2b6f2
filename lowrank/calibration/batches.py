"""Calibration and evaluation data in common forms: texts, tensors, dicts, loaders, callables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from .items import batch_of, is_dataclass, text_of

LENGTH = 256  # tokens per row of cut texts
ROWS = 16  # rows per batch of cut texts
WORD = 64  # letters without a space that may be a name, but hardly a text
IGNORED = -100  # a label of torch's cross entropy, and of transformers, for padding
READ = 256  # rows that a stream is read to, if nothing is said
MOST = 1 << 16  # items of a stream, which need not end

Batch = Tensor | dict[str, Any]
Forward = Callable[[nn.Module], object]
Data = Forward | Iterable[Any] | str | Sequence[str] | Tensor


class Reading(NamedTuple):
    """What was read of the data.

    Attributes:
        rows: how many rows were read, where the data may go on after them; 0 if it was read whole.
    """

    batches: list[Batch] | Forward
    rows: int = 0


class _Quota(NamedTuple):
    """Where reading stops; 0 for no limit."""

    rows: int = 0
    tokens: int = 0  # of texts, of which only a long one fills a row


def materialise(
    data: Data, tokenizer: Any = None, *, length: int = LENGTH
) -> list[Batch] | Forward:
    """All of the data, as batches that can be run repeatedly.

    Args:
        data: a callable `forward(model)`, which is called more than once; a text or a list of
            texts (with a tokenizer); a tensor; or an iterable of tensors, dicts and dataclasses
            (passed as keywords) or tuples (the first item is the input), which is consumed. A row
            of a data set, a dict whose ids have no batch axis, gets one; its flat lists become
            tensors. A dict with a column "text", or one column of texts, is a text.
        tokenizer: of transformers; texts are cut into rows of at most `length` tokens.

    Raises:
        LowrankError: there is no batch (an exhausted iterator), texts without a tokenizer, an item
            of another form, or a stream that goes on after `MOST` items.
    """
    return _read(data, tokenizer, length, _Quota()).batches


def read_rows(
    data: Data, tokenizer: Any = None, *, length: int = LENGTH, rows: int | None = None
) -> Reading:
    """The data as batches, as `materialise` gives them, read to a number of rows and no further.

    Args:
        rows: the batch that reaches this number is read whole; of texts, the last rows are
            dropped. None: a stream, which is all that is no text, tensor, dict, list or tuple, is
            read to READ rows, or of texts to READ × LENGTH tokens; anything else is read whole.

    Raises:
        LowrankError: as `materialise`; `rows` is no positive integer, or the data is a callable.
    """
    check_rows(rows)
    in_memory = isinstance(data, str | Tensor | Mapping | list | tuple)
    default = _Quota() if in_memory else _Quota(READ, READ * LENGTH)
    reading = _read(data, tokenizer, length, default if rows is None else _Quota(rows))
    if rows is not None and callable(reading.batches):
        raise LowrankError(f"rows={rows} counts rows of data, a callable shows none: drop rows")
    return reading


def check_rows(rows: Any) -> None:
    """Raises LowrankError unless it is a positive integer or None."""
    if rows is not None and (not isinstance(rows, Integral) or isinstance(rows, bool) or rows < 1):
        raise LowrankError(f"rows must be a positive integer or None, got {rows!r}")


def _read(data: Any, tokenizer: Any, length: int, quota: _Quota) -> Reading:
    if isinstance(data, Tensor):
        return Reading([_sound(data)])
    if isinstance(data, str):
        data = [_text(data, tokenizer)]
    if not isinstance(data, Iterable) and is_dataclass(data):
        return Reading([_sound(batch_of(data))])
    if isinstance(data, nn.Module | type):
        what = "a class" if isinstance(data, type) else f"a model ({type(data).__name__})"
        raise LowrankError(
            f"data must be what a model reads, or a callable that runs it, got {what}"
        )
    if callable(data) and not isinstance(data, Iterable):
        return Reading(data)
    if not isinstance(data, Iterable):
        raise LowrankError(
            f"data must be texts, tensors, dicts, a loader or a callable, got {type(data).__name__}"
        )
    if isinstance(data, Mapping):
        return Reading([_sound(batch_of(data))])
    return _read_items(data, tokenizer, length, quota)


def _read_items(data: Iterable[Any], tokenizer: Any, length: int, quota: _Quota) -> Reading:
    """All texts, or all batches, up to the quota; a wrong item is refused before more are read."""
    found: list[Any] = []  # batches, or rows of texts
    count, index, texts, went_on = 0, -1, False, False
    for index, item in enumerate(data):
        text = text_of(item) if isinstance(item, Mapping) else item
        texts = isinstance(text, str) if index == 0 else texts
        by_tokens = texts and quota.tokens
        if texts:
            new: Sequence[Any] = _rows_of(text, index, tokenizer, length)
            count += sum(map(len, new)) if by_tokens else len(new)
        else:
            batch = item if isinstance(item, Tensor) else batch_of(item, index)
            new = [_sound(batch, f"item {index} of the data: ")]
            count += rows_in(new[0])
        found += new
        most = quota.tokens if by_tokens else quota.rows
        if most and count >= most:
            went_on = not _has_end(data) or index + 1 < len(data)  # type: ignore[arg-type]
            break
        if index >= max(MOST, *quota) and not _has_end(data):
            raise LowrankError(
                f"the data still goes on after {MOST:,} items: pass a part of it, such as "
                "list(itertools.islice(data, 256))"
            )
    if index < 0:
        raise LowrankError("the data gave no batch: an empty list, or an exhausted iterator?")
    if texts and quota.rows and not quota.tokens:
        went_on = went_on or len(found) > quota.rows
        found = found[: quota.rows]
    number = len(found) if texts else sum(map(rows_in, found))
    return Reading(_by_length(found) if texts else found, number if went_on else 0)


def _sound(batch: Batch, where: str = "") -> Batch:
    """The batch; raises LowrankError if it is empty or has no numbers."""
    parts = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    ids = parts.get("input_ids")
    if isinstance(ids, Tensor) and not ids.numel():
        raise LowrankError(f"{where}it is empty, of shape {tuple(ids.shape)}: leave it out")
    if any(isinstance(value, Tensor) and value.is_meta for value in parts.values()):
        raise LowrankError(f"{where}it is on the meta device, without numbers: load it first")
    return batch


def _rows_of(text: Any, index: int, tokenizer: Any, length: int) -> list[Tensor]:
    """Token rows of an item among texts."""
    if tokenizer is None:
        raise LowrankError("texts need a tokenizer: pass tokenizer=…")
    if not callable(tokenizer):
        raise LowrankError(
            f"tokenizer must be one of transformers, or be called as one, got {tokenizer!r:.80}"
        )
    if not isinstance(text, str):
        raise LowrankError(
            f"item {index} of the data: the data mixes texts and other items, got "
            f"{type(text).__name__}"
        )
    return text_rows(text, tokenizer, length)


def _has_end(data: Iterable[Any]) -> bool:
    try:
        return len(data) >= 0  # type: ignore[arg-type]
    except TypeError:
        return False


def _text(text: str, tokenizer: Any) -> str:
    """The text; raises LowrankError if it is one word, which is rather a name or a path."""
    short = 0 < len(text) <= WORD or "/" in text
    if tokenizer is not None and short and len(text.split()) == 1:
        raise LowrankError(
            f"data={text!r} is one word, not a text, and no data set is known by name: pass the "
            "text itself, a list of texts, or 'self'"
        )
    return text


def text_rows(text: str, tokenizer: Any, length: int) -> list[Tensor]:
    """Token ids of a text, tokenised in one call and cut into rows of `length` (int64)."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    return list(ids.split(length)) if len(ids) else []


def text_batches(texts: Iterable[str], tokenizer: Any, length: int) -> list[Batch]:
    """Batches of token rows of equal length, so that nothing is padded."""
    return _by_length([row for text in texts for row in text_rows(text, tokenizer, length)])


def _by_length(token_rows: Iterable[Tensor]) -> list[Batch]:
    by_length: dict[int, list[Tensor]] = {}
    for row in token_rows:
        by_length.setdefault(len(row), []).append(row)
    if not by_length:
        raise LowrankError("the texts contain no tokens")
    return [
        torch.stack(rows[start : start + ROWS])
        for rows in by_length.values()
        for start in range(0, len(rows), ROWS)
    ]


def first_rows(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """The first rows of the batches; a batch that cannot be cut counts as one."""
    kept: list[Batch] = []
    for batch in batches:
        if rows <= 0:
            break
        here = rows_in(batch)
        part = cut(batch, slice(0, rows)) if here > rows else batch
        kept += [] if part is None else [part]
        rows -= here
    return kept


def rebatched(batches: Sequence[Batch], rows: int = ROWS) -> list[Batch]:
    """The same rows in batches of at most `rows`; a batch that cannot be cut stays whole.

    So does one of 1-d tensors: it may be a single input without a batch axis. Whether the rows are
    independent, the batches do not show: see `independence`.
    """
    batched: list[Batch] = []
    for batch in batches:
        parts = {"": batch} if isinstance(batch, Tensor) else batch
        plain = _is_rows(parts)
        lengths = {len(v) for v in parts.values()} if plain else set()
        plain = plain and len(lengths) == 1
        for start in range(0, lengths.pop(), rows) if plain else ():
            cut = {key: value[start : start + rows] for key, value in parts.items()}
            batched.append(cut[""] if isinstance(batch, Tensor) else cut)
        batched += [] if plain else [batch]
    return batched


def is_dense(tensor: Tensor) -> bool:
    """Whether it has rows that can be cut: it is neither sparse nor nested."""
    return tensor.layout == torch.strided and not tensor.is_nested


def as_dense(tensor: Tensor) -> Tensor:
    """The numbers of any tensor; a nested one is padded with zeros."""
    if is_dense(tensor):
        return tensor
    return torch.nested.to_padded_tensor(tensor, 0) if tensor.is_nested else tensor.to_dense()


def is_padded(batch: Batch) -> bool:
    """Whether a mask or the labels of a batch mark padding."""
    if isinstance(batch, Tensor):
        return False
    marks = (("attention_mask", 0), ("decoder_attention_mask", 0), ("labels", IGNORED))
    return any(isinstance(batch.get(k), Tensor) and bool((batch[k] == v).any()) for k, v in marks)


def cut(batch: Batch, rows: slice) -> Batch | None:
    """Some rows of a batch; what is no tensor, or has no axis, goes with all. None: it has tensors
    of several lengths, of one axis alone, or sparse or nested ones."""
    parts = {"": batch} if isinstance(batch, Tensor) else batch
    tensors = {k: v for k, v in parts.items() if isinstance(v, Tensor) and v.ndim}
    if not all(map(is_dense, tensors.values())):
        return None
    if len({len(v) for v in tensors.values()}) != 1 or all(v.ndim < 2 for v in tensors.values()):
        return None
    some = {**parts, **{name: value[rows] for name, value in tensors.items()}}
    return some[""] if isinstance(batch, Tensor) else some


def rows_in(batch: Batch) -> int:
    """The number of rows of a batch; 1 for one that cannot be cut."""
    parts = [batch] if isinstance(batch, Tensor) else batch.values()
    tensors = [v for v in parts if isinstance(v, Tensor) and v.ndim]
    if not all(map(is_dense, tensors)):
        return 1
    lengths = {len(v) for v in tensors}
    return lengths.pop() if len(lengths) == 1 and any(v.ndim > 1 for v in tensors) else 1


def parted(
    batches: list[Batch] | Forward, share: float, *, whole: bool = False
) -> tuple[list[Batch] | Forward, tuple[Batch, ...]]:
    """The batches less their last rows, and those; a callable or a single row is not split.

    Args:
        whole: rows are not independent: the last batches, not the last rows.

    Raises:
        LowrankError: `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise LowrankError(f"hold_out must be in [0, 1), got {share!r}")
    if share == 0 or callable(batches):
        return batches, ()
    rows = batches if whole else rebatched(batches, 1)
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        return batches, ()
    if whole:
        return rows[:-count], tuple(rows[-count:])
    return _stacked(rows[:-count]), tuple(_stacked(rows[-count:]))


def regrouped(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """`rebatched`; where batches may be larger than usual, small ones are joined too."""
    if rows <= ROWS:
        return rebatched(batches, rows)
    return _stacked(rebatched(batches, 1), rows)


def _stacked(rows: Sequence[Batch], most: int = ROWS) -> list[Batch]:
    """Single rows batched again, where neighbours are tensors of one shape, or dicts of them."""
    runs: list[list[Batch]] = []
    for row in rows:
        fits = runs and len(runs[-1]) < most and _form(row) is not None
        if fits and _form(row) == _form(runs[-1][0]):
            runs[-1].append(row)
        else:
            runs.append([row])
    return [_cat(run) if len(run) > 1 else run[0] for run in runs]


def _form(row: Batch) -> object:
    """What rows of one batch must have in common; None for anything but a single row."""
    parts = {"": row} if isinstance(row, Tensor) else row
    single = _is_rows(parts) and all(len(v) == 1 for v in parts.values())
    return {k: (v.shape, v.dtype, v.device) for k, v in parts.items()} if single else None


def _is_rows(parts: Mapping[str, Any]) -> bool:
    every = all(isinstance(v, Tensor) and v.ndim and is_dense(v) for v in parts.values())
    return every and any(v.ndim > 1 for v in parts.values())


def _cat(rows: Sequence[Batch]) -> Batch:
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.cat([row for row in rows if isinstance(row, Tensor)])
    return {key: torch.cat([row[key] for row in rows]) for key in first}  # type: ignore[index]
