"""Whether the rows of a batch are independent, by measurement.

The first axis of all inputs may count nodes of one graph, points of one cloud or steps of time.
They can be cut as rows can, and then give something else, or nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batches import ROWS, Batch, cut, rows_in
from .running import few_rows, forward, predictions_of, quiet, tensors_in

MOST = 4 * ROWS  # rows to compare within
LEAST = 1e-3  # relative error that other kernels for other sizes explain, in any precision


def rows_depend(model: nn.Module, batch: Batch) -> bool:
    """Whether some rows alone give other outputs than among all: then they must not be cut.

    The rows are those of the middle, for what depends on earlier or on later ones alone. Anything
    that the model raises counts as dependence, and so do outputs that are not one a row. Two
    forward passes in evaluation mode; the model and random states are as before.

    Args:
        batch: of at least two rows, which `cut` can cut.
    """
    few = few_rows(model, batch)
    most = MOST if few == ROWS else max(few, 2)
    total = rows_in(batch)
    start = max(min(total, most) // 3, 1)
    stop = max(min(start + few, min(total, most) - 1), start + 1)
    if _cannot_be_tried(model, batch, stop - start):
        return True
    every = batch if total <= most else cut(batch, slice(0, most))
    some = cut(batch, slice(start, stop))
    if every is None or some is None:
        return True
    try:
        with quiet(model):
            whole, _ = predictions_of(model, forward(model, every))
            alone, _ = predictions_of(model, forward(model, some))
        return _differ(alone, whole[start:stop])
    except Exception:  # whatever a model of any kind raises on inputs that do not belong together
        return True


def _differ(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return True
    tolerance = max(torch.finfo(expected.dtype).eps ** 0.5, LEAST)
    found, expected = (torch.nan_to_num(t.double(), 0, 0, 0) for t in (found, expected))
    return float((found - expected).norm()) > tolerance * float(expected.norm())


def _cannot_be_tried(model: nn.Module, batch: Batch, rows: int) -> bool:
    """Whether an integer may number a row that `rows` rows lack: a failed lookup on an accelerator
    is no exception, it ends the process."""
    first = next(model.parameters(), None)
    if isinstance(batch, Tensor) or first is None or first.device.type == "cpu":
        return False
    whole = [t for t in tensors_in(batch) if not (t.is_floating_point() or t.is_complex())]
    return any(rows <= int(t.max()) < rows_in(batch) for t in whole if t.numel())
