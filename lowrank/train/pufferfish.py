"""Pufferfish: train dense for some epochs, then factored at a share of the full rank.

arXiv 2103.03936. Its three parts: a warm-up of the full model, truncated SVD at one share of the
full rank for all layers, and a hybrid net, in which the first layers and the last one stay dense.
The optimizer starts the factors without a state, as in the paper; after the switch the paper warms
the learning rate up again, which is left to the user.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import LowrankError
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.factor_controller import FactorController
from .parts.product_decay import add_decay, check_strength, refuse_decay


class Pufferfish(FactorController):
    """Dense for some epochs, then a fixed share of the full rank, in the user's own loop.

    For the hybrid net, leave layers out by `exclude_modules`.

    Attributes:
        switched: the epoch after which the layers were factored, None before that.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        epochs: int,
        share: float = 0.25,
        frobenius_decay: float = 0.0,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
    ) -> None:
        """
        Args:
            epochs: dense ones, at least 1.
            share: of min(out, in), in (0, 1): the rank of every layer.
            frobenius_decay: λ of λ/2 · ‖W‖², see FrobeniusDecay; needs weight_decay=0.

        Raises:
            LowrankError: an option is out of range, or `Attachment` refuses the model.
        """
        if epochs < 1:
            raise LowrankError(f"epochs of dense training must be at least 1, got {epochs}")
        if not 0 < share < 1:
            raise LowrankError(f"share of the full rank must be in (0, 1), got {share}")
        check_strength(frobenius_decay)
        self.epochs, self.share, self.frobenius_decay = epochs, share, frobenius_decay
        self.epoch = 0
        self.switched: int | None = None
        super().__init__(model, optimizer, target_modules, exclude_modules)

    def check_sites(self) -> None:
        if self.frobenius_decay:
            refuse_decay(self.attachment)

    def on_gradients(self) -> None:
        add_decay(self.layers.values(), self.frobenius_decay * self.attachment.loss_scale())

    def on_epoch(self) -> None:
        self.epoch += 1
        if self.switched is None and self.epoch >= self.epochs:
            sites = self.attachment.sites
            ranks = {site.name: max(int(self.share * min(site.shape)), 1) for site in sites}
            self.factor(ranks, only_smaller=True)
            self.switched = self.epoch

    def progress(self) -> dict[str, Any]:
        return {"policy": {"epoch": self.epoch, "switched": self.switched}}

    def resume(self, state: dict[str, Any]) -> None:
        self.epoch, self.switched = state["policy"]["epoch"], state["policy"]["switched"]
