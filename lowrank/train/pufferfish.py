"""Pufferfish: train dense for some epochs, then factored at a share of the full rank.

arXiv 2103.03936. Its three parts: a warm-up of the full model, truncated SVD at one share of the
full rank for all layers, and a hybrid net, in which the first layers and the last one stay dense.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import LowrankError
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.switching import Switching


class Pufferfish(Switching):
    """Dense for some epochs, then a fixed share of the full rank, in the user's own loop.

    For the hybrid net leave layers out by `exclude_modules`.

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
            LowrankError: an option is out of range, or what `Attachment` refuses.
        """
        if epochs < 1:
            raise LowrankError(f"epochs of dense training must be at least 1, got {epochs}")
        if not 0 < share < 1:
            raise LowrankError(f"share of the full rank must be in (0, 1), got {share}")
        self.epochs, self.share = epochs, share
        super().__init__(model, optimizer, frobenius_decay, target_modules, exclude_modules)

    def _ranks(self) -> dict[str, int] | None:
        if self.epoch < self.epochs:
            return None
        return {s.name: max(int(self.share * min(s.shape)), 1) for s in self._at.sites}
