"""Further rows to distil on, which the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibration import self_written
from ..calibration.batches import Batch
from ..calibration.processes import agreed
from .budget import now
from .recovery import Recovery

SHARE = 0.25  # of the time left, at most


def further(
    model: nn.Module, batches: Sequence[Batch], recovery: Recovery, seed: int, end: float | None
) -> list[Tensor]:
    """Further batches to distil on, if the model can write text: distilled on few rows alone, it
    would match the dense model on those only.

    Args:
        batches: of the data, whose longest row says how long these are.
        seed: not that of the calibration rows, if those were self-written.
        end: see `written_until`.
    """
    length = _longest(batches)
    if not recovery.written or not length or not self_written.writes(model):
        return []
    text = written_until(model, recovery.written, length, seed, end)
    return [rows for rows in text.split(recovery.rows) if len(rows)]


def written_until(model: nn.Module, rows: int, length: int, seed: int, end: float | None) -> Tensor:
    """Rows (rows, length) that the model writes: all, or as many as it writes in a quarter of the
    time up to `end`, some at a time.

    Args:
        end: by `now`; None for no limit.
    """
    if end is None:
        return self_written.write(model, rows=rows, length=length, seed=seed)
    stop = now() + SHARE * (end - now())
    parts: list[Tensor] = []
    left = rows
    while left and agreed(now() < stop):
        some = min(left, self_written.TOGETHER)
        parts.append(self_written.write(model, rows=some, length=length, seed=seed + len(parts)))
        left -= some
    return torch.cat(parts) if parts else torch.zeros(0, length, dtype=torch.long)


def _longest(batches: Sequence[Batch]) -> int:
    """Length of the longest row, in tokens; 0 if the batches hold no token ids."""
    ids = [b if isinstance(b, Tensor) else b.get("input_ids") for b in batches]
    known = [t for t in ids if isinstance(t, Tensor) and not t.is_floating_point()]
    return max((t.shape[-1] for t in known if t.ndim == 2), default=0)
