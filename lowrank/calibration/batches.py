"""Calibration and evaluation data in common forms: texts, tensors, dicts, loaders, callables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError

LENGTH = 256  # tokens per row of cut texts
ROWS = 16  # rows per batch of cut texts
WORD = 64  # letters without a space that may be a name, but hardly a text
IGNORED = -100  # a label of torch's cross entropy, and of transformers, for padding
MOST = 1 << 16  # items of a stream, which need not end

Batch = Tensor | dict[str, Any]
Forward = Callable[[nn.Module], object]
Data = Forward | Iterable[Any] | str | Sequence[str] | Tensor


def materialise(
    data: Data, tokenizer: Any = None, *, length: int = LENGTH
) -> list[Batch] | Forward:
    """The data as batches that can be run repeatedly.

    Args:
        data: a callable `forward(model)`, which is called more than once; a text or a list of
            texts (with a tokenizer); a tensor; or an iterable of tensors, dicts and dataclasses
            (passed as keywords) or tuples (the first item is the input), which is consumed. A row
            of a dataset, a dict whose ids have no batch axis, gets one.
        tokenizer: of transformers; texts are cut into rows of at most `length` tokens.

    Raises:
        LowrankError: there is no batch (an exhausted iterator), texts without a tokenizer, a
            batch of another form, or a stream that goes on after `MOST` items.
    """
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, str):
        data = [_text(data, tokenizer)]
    if _is_dataclass(data) and not isinstance(data, Iterable):
        return [_batch(data)]
    if callable(data) and not isinstance(data, Iterable):
        return data
    if not isinstance(data, Iterable):
        raise LowrankError(
            f"data must be texts, tensors, dicts, a loader or a callable, got {type(data).__name__}"
        )
    if isinstance(data, Mapping):
        return [_batch(data)]
    items = _items(data)
    if not items:
        raise LowrankError("the data gave no batch: an empty list, or an exhausted iterator?")
    if isinstance(items[0], str):
        if tokenizer is None:
            raise LowrankError("texts need a tokenizer: pass tokenizer=…")
        return text_batches(items, tokenizer, length)
    return items


def _items(data: Iterable[Any]) -> list[Any]:
    """All texts, or all batches; the first item that is neither is refused before more are read."""
    items: list[Any] = []
    for item in data:
        is_text = isinstance(item, str) and (not items or isinstance(items[0], str))
        if items and isinstance(items[0], str) and not is_text:
            raise LowrankError(f"the data mixes texts and other items, got {type(item).__name__}")
        items.append(item if is_text else _batch(item))
        if len(items) > MOST and not _has_end(data):
            raise LowrankError(
                f"the data still goes on after {MOST:,} items: pass a part of it, such as "
                "list(itertools.islice(data, 256))"
            )
    return items


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
    by_length: dict[int, list[Tensor]] = {}
    for text in texts:
        for row in text_rows(text, tokenizer, length):
            by_length.setdefault(len(row), []).append(row)
    if not by_length:
        raise LowrankError("the texts contain no tokens")
    return [
        torch.stack(rows[start : start + ROWS])
        for rows in by_length.values()
        for start in range(0, len(rows), ROWS)
    ]


def rebatched(batches: Sequence[Batch], rows: int = ROWS) -> list[Batch]:
    """The same rows in batches of at most `rows`; a batch that cannot be cut stays whole.

    So does one of 1-d tensors: it may be a single input without a batch axis. Whether the rows are
    independent, the batches do not show: see `independence`.
    """
    batched: list[Batch] = []
    for batch in batches:
        parts = {"": batch} if isinstance(batch, Tensor) else batch
        lengths = {len(v) for v in parts.values() if isinstance(v, Tensor) and v.ndim}
        plain = _is_rows(parts) and len(lengths) == 1
        for start in range(0, lengths.pop(), rows) if plain else ():
            cut = {key: value[start : start + rows] for key, value in parts.items()}
            batched.append(cut[""] if isinstance(batch, Tensor) else cut)
        batched += [] if plain else [batch]
    return batched


def is_padded(batch: Batch) -> bool:
    """Whether a mask or the labels of a batch mark padding."""
    if isinstance(batch, Tensor):
        return False
    marks = (("attention_mask", 0), ("decoder_attention_mask", 0), ("labels", IGNORED))
    return any(isinstance(batch.get(k), Tensor) and bool((batch[k] == v).any()) for k, v in marks)


def cut(batch: Batch, rows: slice) -> Batch | None:
    """Some rows of a batch; what is no tensor, or has no axis, goes with all. None: it has tensors
    of several lengths, or of one axis alone."""
    parts = {"": batch} if isinstance(batch, Tensor) else batch
    tensors = {k: v for k, v in parts.items() if isinstance(v, Tensor) and v.ndim}
    if len({len(v) for v in tensors.values()}) != 1 or all(v.ndim < 2 for v in tensors.values()):
        return None
    some = {**parts, **{name: value[rows] for name, value in tensors.items()}}
    return some[""] if isinstance(batch, Tensor) else some


def rows_in(batch: Batch) -> int:
    """The number of rows of a batch; 1 for one that cannot be cut."""
    parts = [batch] if isinstance(batch, Tensor) else batch.values()
    tensors = [v for v in parts if isinstance(v, Tensor) and v.ndim]
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


def _stacked(rows: Sequence[Batch]) -> list[Batch]:
    """Single rows batched again, where neighbours are tensors of one shape, or dicts of them."""
    runs: list[list[Batch]] = []
    for row in rows:
        fits = runs and len(runs[-1]) < ROWS and _form(row) is not None
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
    every = all(isinstance(v, Tensor) and v.ndim for v in parts.values())
    return every and any(v.ndim > 1 for v in parts.values())


def _cat(rows: Sequence[Batch]) -> Batch:
    first = rows[0]
    if isinstance(first, Tensor):
        return torch.cat([row for row in rows if isinstance(row, Tensor)])
    return {key: torch.cat([row[key] for row in rows]) for key in first}  # type: ignore[index]


def _batch(item: Any) -> Batch:
    if isinstance(item, Tensor):
        return item
    if _is_dataclass(item) and not isinstance(item, Mapping):
        named = ((f.name, getattr(item, f.name)) for f in dataclasses.fields(item))
        item = {name: value for name, value in named if value is not None}
    if isinstance(item, Mapping):
        if any(isinstance(value, Tensor) for value in item.values()):
            return _with_rows(dict(item))
        kinds = ", ".join(f"{key}: {type(value).__name__}" for key, value in item.items())
        raise LowrankError(
            f"a batch that is a dict must hold tensors, got {{{kinds}}}: "
            "collate the rows, or tokenise with return_tensors='pt'"
        )
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        if len(item) > 1 and _is_mask(item[1], item[0]):
            raise LowrankError(
                "a tuple's first item is the input and the others are dropped, but its second one "
                "looks like a mask: pass dicts, {'input_ids': …, 'attention_mask': …}"
            )
        return item[0]
    raise LowrankError(
        f"a batch must be a tensor, a dict of tensors, or a tuple that starts with a tensor, "
        f"got {type(item).__name__}"
    )


def _is_dataclass(item: Any) -> bool:
    return dataclasses.is_dataclass(item) and not isinstance(item, type)


def _with_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """A row of a dataset in torch format as a batch of one row."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 1:
        return batch
    return {name: v[None] if isinstance(v, Tensor) else v for name, v in batch.items()}


def _is_mask(second: Any, first: Tensor) -> bool:
    """Whether a tensor marks the padding of ids: of their shape, of ones and some zeros."""
    if not isinstance(second, Tensor) or second.shape != first.shape or first.ndim < 2:
        return False
    if first.is_floating_point() or second.is_floating_point():
        return False
    return bool(((second == 0) | (second == 1)).all()) and bool((second == 0).any())
