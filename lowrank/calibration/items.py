"""One item of the data as a batch, or as a text; what is neither is refused with its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import LowrankError

TEXT = "text"  # what data sets call the column of their texts


def batch_of(item: Any, index: int | None = None) -> Tensor | dict[str, Any]:
    """A tensor, or a dict with tensors, of what a loader or a data set gives.

    A row of a data set, a dict whose ids have no batch axis, gets one; its flat lists of numbers
    become tensors.

    Args:
        index: of the item in the data, for errors.

    Raises:
        LowrankError: it has no tensors, or is a tuple whose mask would be dropped.
    """
    where = "" if index is None else f"item {index} of the data: "
    if isinstance(item, Tensor):
        return item
    if is_dataclass(item) and not isinstance(item, Mapping):
        named = ((f.name, getattr(item, f.name)) for f in dataclasses.fields(item))
        item = {name: value for name, value in named if value is not None}
    if isinstance(item, Mapping):
        batch = {name: _numbers(value) for name, value in item.items()}
        if any(isinstance(value, Tensor) for value in batch.values()):
            return _with_rows(batch)
        kinds = ", ".join(f"{key}: {type(value).__name__}" for key, value in item.items())
        raise LowrankError(
            f"{where}a batch that is a dict must hold tensors, got {{{kinds}}}: "
            "collate the rows, or tokenise with return_tensors='pt'"
        )
    if isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        if len(item) > 1 and _is_mask(item[1], item[0]):
            raise LowrankError(
                f"{where}a tuple's first item is the input and the others are dropped, but its "
                "second one looks like a mask: pass dicts, {'input_ids': …, 'attention_mask': …}"
            )
        return item[0]
    raise LowrankError(
        f"{where}a batch must be a tensor, a dict of tensors, or a tuple that starts with a "
        f"tensor, got {type(item).__name__}"
    )


def text_of(row: Mapping[str, Any]) -> str | None:
    """The text of a data set's row: its column "text", or its only column; None if it has other
    numbers or tensors, or no text."""
    if any(isinstance(_numbers(value), Tensor) for value in row.values()):
        return None
    text = next(iter(row.values())) if len(row) == 1 else row.get(TEXT)
    return text if isinstance(text, str) else None


def is_dataclass(item: Any) -> bool:
    return dataclasses.is_dataclass(item) and not isinstance(item, type)


def _numbers(value: Any) -> Any:
    """A flat list of numbers as a tensor; anything else as it is."""
    flat = isinstance(value, list) and value and all(type(v) in (int, float, bool) for v in value)
    return torch.tensor(value) if flat else value


def _with_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """A row of a data set as a batch of one row."""
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
