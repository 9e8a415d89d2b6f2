"""A sample of the rows that each MLP reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..walk.mlps import MLP
from .batches import Batch, Forward
from .gathering import run_all
from .padding import Padding
from .running import Unpadded, first_tensor, quiet
from .statistics import followed


def rows_of_mlps(
    model: nn.Module,
    mlps: Sequence[MLP],
    batches: list[Batch] | Forward,
    *,
    most: int,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """By the name of each MLP rows (n, in) that it reads, n at most `most`, drawn from all calls;
    padding is left out where it is known.

    Raises:
        LowrankError: a row holds NaN or Inf.
    """
    run, padding = batches, Padding(model) if callable(batches) else Unpadded()
    if not callable(batches):
        padding, run = followed(model, batches)
    quota = most if callable(run) else -(-most // max(len(run), 1))
    samples = {mlp.name: _Sample(most, quota, seed) for mlp in mlps}

    def hook_of(mlp: MLP) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = first_tensor((args, kwargs))
            assert tensor is not None  # it is an MLP
            real = padding.real(mlp.name, module, tensor)
            rows = tensor.detach().flatten(0, -2)
            samples[mlp.name].add(rows if real is None else rows[real.flatten().to(rows.device)])

        return hook

    handles = [m.module.register_forward_pre_hook(hook_of(m), with_kwargs=True) for m in mlps]
    try:
        with quiet(model), padding:
            run_all(model, run, padding, progress)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: sample.rows() for name, sample in samples.items()}
    bad = [name for name, rows in found.items() if not bool(rows.isfinite().all())]
    if bad:
        raise LowrankError(f"{bad[0] or '(root)'}: its input holds NaN or Inf: check the data")
    return found


class _Sample:
    """Rows drawn from each call, and thinned where they become too many."""

    def __init__(self, most: int, quota: int, seed: int) -> None:
        self._most, self._quota = most, quota
        self._draw = torch.Generator().manual_seed(seed)
        self._kept: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self._kept.append(self._drawn(rows, self._quota))
        if sum(map(len, self._kept)) > 2 * self._most:
            self._kept = [self.rows()]

    def rows(self) -> Tensor:
        return self._drawn(torch.cat(self._kept), self._most)

    def _drawn(self, rows: Tensor, most: int) -> Tensor:
        if len(rows) <= most:
            return rows.clone()
        places = torch.randperm(len(rows), generator=self._draw)[:most].sort().values
        return rows[places.to(rows.device)]
