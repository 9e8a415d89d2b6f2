"""Controllers whose layers are dense or `LowRankLinear`, and may become the one or the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...errors import LowrankError
from ...nn import LowRankLinear
from ...types import Site
from .base_controller import BaseController
from .compressed import held_rank
from .factors import empty_factors, factor_site, keep_smaller, resize_to


class FactorController(BaseController[nn.Module]):
    """Sizes are ranks; `finish` leaves factors, or a dense layer where that is not larger."""

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer that is factored now."""
        return {name: layer.rank for name, layer in self.factored.items()}

    @property
    def factored(self) -> dict[str, LowRankLinear]:
        """The layers that are factored now, by name."""
        return {n: layer for n, layer in self.layers.items() if isinstance(layer, LowRankLinear)}

    def factor(self, ranks: Mapping[str, int], *, only_smaller: bool = False) -> None:
        """Put factors of these ranks in place of all dense layers, and of factored ones.

        Args:
            ranks: one for every layer, by name; of a factored one at most the rank that it has.
            only_smaller: leave a layer dense where its factors would not be smaller; the history
                says which.
        """
        for site in list(self.attachment.sites):
            rank, held = ranks[site.name], held_rank(site.module)
            rank = rank if held is None else min(rank, held)
            if only_smaller and rank * sum(site.shape) >= math.prod(site.shape):
                reason = "its factors are not smaller"
                self.attachment.note("left", site.name, rank=rank, reason=reason)
            else:
                self.layers[site.name] = factor_site(self.attachment, site, rank)
        self.attachment.resized()

    def leave(self, name: str, layer: nn.Module) -> None:
        keep_smaller(self.attachment, name, layer)

    def size_of(self, layer: nn.Module) -> int | None:
        return layer.rank if isinstance(layer, LowRankLinear) else None

    def check_state(self, state: dict[str, Any]) -> None:
        for name in self.factored:
            if state["sites"][name] is None:
                raise LowrankError(
                    f"{name} is dense in this state and factored here: build the controller on a "
                    "fresh model, as when the run began"
                )

    def resize(self, site: Site, size: int | None) -> None:
        layer = self.layers[site.name]
        if size is not None and isinstance(layer, LowRankLinear):
            resize_to(self.attachment, layer, size)
        elif size is not None:
            self.layers[site.name] = empty_factors(self.attachment, site, size)

    def progress(self) -> dict[str, Any]:
        return {"policy": {}}
