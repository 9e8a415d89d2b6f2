"""How often every row of every embedding is looked up, counted by hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..types import Site, Statistics
from ..walk import layouts
from .running import first_tensor


class Frequencies:
    """Counts while it is entered; positions that `mask` pads are left out."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._counts = {site.name: torch.zeros(0) for site in sites}
        self._sites = sites
        self._mask: Tensor | None = None
        self._handles: list[Any] = []

    def mask(self, mask: Tensor | None) -> None:
        self._mask = mask

    def __enter__(self) -> None:
        for site in self._sites:
            for module in site.modules:
                if layouts.kind(module) == "embedding":
                    hook = self._hook(site)
                    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                    self._handles.append(handle)

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def statistics(self, name: str, head: Statistics | None) -> Statistics:
        """Of one table; `head` is what the output head that shares its weight was given."""
        counts = self._counts[name]
        if not counts.numel():
            return Statistics()
        seen = Statistics(count=int(counts.sum()), freq=counts)
        return seen if head is None else replace(seen, gram=head.gram, mean=head.mean)

    def _hook(self, site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            ids = first_tensor((args, kwargs))
            if ids is not None:
                self._add(site, ids.detach(), module.padding_idx)

        return hook

    @torch.inference_mode(False)  # counts outlive the caller's inference mode
    def _add(self, site: Site, ids: Tensor, padding: Any) -> None:
        """Count ids of any shape.

        Raises:
            LowrankError: an id has no row; the site is named, where torch names none.
        """
        if ids.is_floating_point():
            return  # the layer itself will refuse it, and say it better
        rows = site.shape[0]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise LowrankError(
                f"{site.title}: ids must be in [0, {rows}), the data holds "
                f"{int(ids.min())} to {int(ids.max())}"
            )
        if self._mask is not None and ids.shape == self._mask.shape:
            ids = ids[self._mask.to(ids.device)]
        counts = torch.bincount(ids.flatten().long(), minlength=rows).double()
        if padding is not None:
            counts[padding] = 0  # padding is no token
        before = self._counts[site.name]
        self._counts[site.name] = counts if not before.numel() else before + counts.to(before)
