"""Gathering statistics: hooks on the layers' inputs, one Gram matrix per distinct input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..linalg import gram_sum
from ..linalg.mapped import give_back, zeros
from ..plans.progress import steps
from ..types import Site, Statistics
from ..walk import layouts
from .batches import Batch, Forward
from .observation import Frequencies, Observation
from .padding import Padding
from .processes import check_same, gathered, in_step, mine, summed
from .running import SameTensor, Unpadded, first_tensor, forward, input_of, quiet

Groups = tuple[tuple[str, ...], ...]
Seen = tuple[set[str], tuple[str, ...]]


def gather_statistics(
    model: nn.Module,
    batches: list[Batch] | Forward,
    observation: Observation,
    readers: Sequence[Site],
    tables: Sequence[Site],
    padding: Padding | Unpadded,
    progress: bool,
) -> tuple[dict[str, Statistics], Groups, Frequencies]:
    """Statistics by site, the groups of sites that read one tensor in every batch, and lookups."""
    groups = observation.groups
    unseen = tuple((site.name,) for site in readers if site.name not in observation.shapes)
    by_name = {site.name: site for site in readers}
    while True:
        gather = _Gather(
            [[by_name[name] for name in group] for group in (*groups, *unseen)], padding
        )
        lookups = Frequencies(tables, padding)

        def run(gather: _Gather = gather, lookups: Frequencies = lookups) -> Seen:
            with quiet(model), padding, gather, lookups:
                run_all(model, batches if callable(batches) else mine(batches), padding, progress)
            gather.check_calls()
            return gather.parted, tuple(padding.uncertain)

        seen = in_step(run)
        gather.parted = set().union(*(parted for parted, _ in seen))
        if isinstance(padding, Padding):
            padding.uncertain = dict.fromkeys(name for _, names in seen for name in names)
        if not gather.parted:
            if callable(batches):  # every process ran all of it
                check_same(data=gather.counts())
            else:
                gather.add_up()
                lookups.add_up()
            return gather.statistics(), groups, lookups
        # A later batch gave members of a group different tensors: gather those one by one.
        groups = _split(groups, gather.parted)


class _Gather:
    """Hooks on all groups; the first member is accumulated, the others are compared with it."""

    def __init__(self, groups: Sequence[Sequence[Site]], padding: Padding | Unpadded) -> None:
        self._sums = [_Sums(group[0]) for group in groups]
        self._groups = groups
        self._padding = padding
        self._handles: list[Any] = []
        self.parted: set[str] = set()

    def __enter__(self) -> None:
        for sums, group in zip(self._sums, self._groups, strict=True):
            for position, site in enumerate(group):
                hook = self._owner(sums) if position == 0 else self._member(sums, site.name)
                self._handles += [
                    module.register_forward_pre_hook(hook, with_kwargs=True)
                    for module in site.modules
                ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _owner(self, sums: _Sums) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = input_of(args, kwargs)
            if tensor is not None and layouts.fits(module, tensor):  # else it raises by itself
                sums.add(tensor, self._padding.real(sums.site.name, module, tensor))
                give_back()

        return hook

    def _member(self, sums: _Sums, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = first_tensor((args, kwargs))
            sums.calls[name] = sums.calls.get(name, 0) + 1
            if tensor is None or sums.last is None or not sums.last(tensor):
                self.parted.add(name)

        return hook

    def check_calls(self) -> None:
        """Part members not called as often as the first: they did not see all of its tensors."""
        for sums in self._sums:
            self.parted.update(n for n, calls in sums.calls.items() if calls != sums.owner_calls)

    def counts(self) -> list[int]:
        """The number of input vectors of each group."""
        return [sums.count for sums in self._sums]

    def add_up(self) -> None:
        """Add the sums of the other processes."""
        for sums, *counts in zip(self._sums, *gathered(self.counts()), strict=True):
            sums.add_up(sum(counts))

    def statistics(self) -> dict[str, Statistics]:
        statistics: dict[str, Statistics] = {}
        for sums, group in zip(self._sums, self._groups, strict=True):
            shared = sums.finish()
            statistics.update({site.name: shared for site in group})
        return statistics


class _Sums:
    """Running sums of one distinct input, in float64."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.count = 0
        self.gram: Tensor | None = None
        self.sum: Tensor | None = None
        self.last: SameTensor | None = None
        self.owner_calls = 0
        self.calls: dict[str, int] = {}

    @torch.inference_mode(False)  # sums outlive the caller's inference mode
    def add(self, tensor: Tensor, mask: Tensor | None) -> None:
        self.last = SameTensor(tensor)
        self.owner_calls += 1
        for rows in counted_rows(self.site.module, tensor.detach(), mask):
            self._add(rows)

    def _add(self, rows: Tensor) -> None:
        self._begin(rows.shape[1], rows.device)
        assert self.gram is not None
        assert self.sum is not None
        gram_sum(rows, self.gram)
        if not bool(torch.isfinite(self.gram.diagonal()).all()):
            raise LowrankError(
                f"{self.site.title}: its input holds NaN or Inf, or numbers too large to square: "
                "check the data and the layers before it; float16 overflows where float32 and "
                "bfloat16 do not"
            )
        self.sum += rows.double().sum(0)
        self.count += len(rows)

    def _begin(self, side: int, device: torch.device) -> None:
        if self.gram is None:
            self.gram = zeros(side, side, dtype=torch.float64, device=device)
            self.sum = torch.zeros(side, dtype=torch.float64, device=device)

    def add_up(self, count: int) -> None:
        """Add the sums of the other processes; `count` of all."""
        if count:
            self._begin(self.site.shape[1], layouts.matrix(self.site.module).device)
        if self.gram is not None and self.sum is not None:
            summed(self.gram, self.sum)
        self.count = count

    def finish(self) -> Statistics:
        if self.count == 0 or self.gram is None or self.sum is None:
            return Statistics()
        return Statistics(self.count, self.gram.div_(self.count), self.sum / self.count)


def counted_rows(module: nn.Module, tensor: Tensor, real: Tensor | None) -> Iterator[Tensor]:
    """The input vectors (rows, in) of a layer, in chunks; those at the `real` positions alone."""
    start = 0
    keep = None if real is None else real.flatten().to(tensor.device)
    for rows in layouts.chunks(module, tensor):
        yield rows if keep is None else rows[keep[start : start + len(rows)]]
        start += len(rows)


def run_all(
    model: nn.Module, batches: list[Batch] | Forward, padding: Padding | Unpadded, progress: bool
) -> None:
    """Forward passes over all batches, with what follows the padding."""
    if callable(batches):
        padding.start(None)
        batches(model)
        return
    for batch in steps(batches, "batch", progress):
        padding.start(batch)
        forward(model, batch)


def _split(groups: Groups, parted: set[str]) -> Groups:
    kept = [tuple(name for name in group if name not in parted) for group in groups]
    return (*(group for group in kept if group), *((name,) for name in sorted(parted)))
