"""From dense to factored in the midst of training: what Pufferfish and Cuttlefish share.

Both train dense first, factor every chosen layer once by a truncated SVD, and train on. The weights
are those of the dense net but for the truncation; state of the optimizer begins anew for factors,
as both papers do, while other parameters keep theirs. Learning rates are the user's: both papers
warm up again after the switch.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ...walk.sites import Patterns
from ..frobenius import check_strength, refuse_decay
from .factor_controller import FactorController
from .factors import decay, enter


class Switching(FactorController):
    """Dense until `_ranks` says otherwise; λ/2 · ‖W‖² before and after, where it is asked for.

    Attributes:
        switched: the epoch after which the layers were factored, None before that.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        frobenius_decay: float,
        target_modules: Patterns,
        exclude_modules: Patterns | None,
    ) -> None:
        check_strength(frobenius_decay)
        self.frobenius_decay = frobenius_decay
        self.switched: int | None = None
        self.epoch = 0
        super().__init__(model, optimizer, target_modules, exclude_modules)
        if frobenius_decay:
            refuse_decay(self._at)

    def _ranks(self) -> dict[str, int] | None:
        """At the end of an epoch: the rank of every layer, by name, or None to go on dense."""
        raise NotImplementedError

    def _add(self) -> None:
        scale = self._at.loss_scale()
        for module in self._layers.values() if self.frobenius_decay else ():
            decay(module, self.frobenius_decay, scale)

    def _epoch(self) -> None:
        self.epoch += 1
        if self.switched is not None:
            return
        ranks = self._ranks()
        if ranks is None:
            return
        for site in list(self._at.sites):
            rank = ranks[site.name]
            if rank * sum(site.shape) >= math.prod(site.shape):
                self._at.note("left", site.name, rank=rank, reason="its factors are not smaller")
            else:
                self._layers[site.name] = enter(self._at, site, rank)
        self.switched = self.epoch
        self._at.resized()

    def _policy(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "switched": self.switched}

    def _take(self, policy: dict[str, Any]) -> None:
        self.epoch, self.switched = policy["epoch"], policy["switched"]
