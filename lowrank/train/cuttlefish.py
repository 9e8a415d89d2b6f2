"""Cuttlefish: train dense until the ranks have settled, then factored at the ranks found.

arXiv 2305.02538. After every epoch the stable rank sr = Σσ²/σ²_max of each layer is taken; times
ξ = R / sr(at the start), R = min(out, in), it estimates the rank: what is random counts as full.
Once the smoothed stable ranks of all layers stand still, each layer is factored at

    r = min(R, ⌈ξ · sr⌉).

Against the authors' code: stable ranks stay real numbers (there they are cut to integers before
they are compared), and no layer is chosen by its position (there by profiling on a GPU): leave
layers out by `exclude_modules`. The optimizer starts the factors without a state, as in the paper;
after the switch the paper warms the learning rate up again, which is left to the user.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import LowrankError
from ..linalg import svd
from ..linalg.spectra import stable_rank
from ..types import Site
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.factor_controller import FactorController
from .parts.product_decay import add_decay, check_strength, refuse_decay


class Cuttlefish(FactorController):
    """Dense until stable ranks settle, then factored at those ranks, in the user's own loop.

    Attributes:
        switched: the epoch after which the layers were factored, None before that.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        tolerance: float = 0.1,
        window: int = 10,
        smooth: int = 15,
        min_epochs: int = 15,
        max_epochs: int | None = None,
        frobenius_decay: float = 0.0,
        target_modules: Patterns = ALL_LINEAR,
        exclude_modules: Patterns | None = None,
    ) -> None:
        """
        Args:
            tolerance: a layer has settled where its smoothed stable rank moves by no more than this
                an epoch, in the mean of the window.
            window: epochs whose changes are looked at.
            smooth: epochs of the exponential mean, whose weight is 2 / (smooth + 1).
            min_epochs: dense ones at least.
            max_epochs: switch then at the latest; None waits until all have settled.
            frobenius_decay: λ of λ/2 · ‖W‖², see FrobeniusDecay; needs weight_decay=0.

        Raises:
            LowrankError: an option is out of range, or `Attachment` refuses the model.
        """
        if not tolerance > 0:
            raise LowrankError(f"tolerance is a change of rank an epoch, above 0, got {tolerance}")
        if min(window, smooth, min_epochs) < 1:
            got = f"{window}, {smooth} and {min_epochs}"
            raise LowrankError(f"window, smooth and min_epochs must be at least 1, got {got}")
        if max_epochs is not None and max_epochs < min_epochs:
            raise LowrankError(f"need min_epochs <= max_epochs, got {min_epochs} and {max_epochs}")
        check_strength(frobenius_decay)
        self.tolerance, self.window, self.smooth = tolerance, window, smooth
        self.min_epochs, self.max_epochs = min_epochs, max_epochs
        self.frobenius_decay = frobenius_decay
        self.epoch = 0
        self.switched: int | None = None
        super().__init__(model, optimizer, target_modules, exclude_modules)
        self._measured = {site.name: [_stable_rank(site)] for site in self.attachment.sites}

    @property
    def stable_ranks(self) -> dict[str, list[float]]:
        """Of every layer: at the start and after each dense epoch."""
        return {name: list(values) for name, values in self._measured.items()}

    def check_sites(self) -> None:
        if self.frobenius_decay:
            refuse_decay(self.attachment)

    def on_gradients(self) -> None:
        add_decay(self.layers.values(), self.frobenius_decay * self.attachment.loss_scale())

    def on_epoch(self) -> None:
        self.epoch += 1
        if self.switched is not None:
            return
        sites = self.attachment.sites
        for site in sites:
            self._measured[site.name].append(_stable_rank(site))
            self.attachment.note("rank", site.name, stable_rank=self._measured[site.name][-1])
        if self._settled():
            ranks = {site.name: estimate(site.shape, self._measured[site.name]) for site in sites}
            self.factor(ranks, only_smaller=True)
            self.switched = self.epoch

    def _settled(self) -> bool:
        if self.max_epochs is not None and self.epoch >= self.max_epochs:
            return True
        return self.epoch >= self.min_epochs and all(
            movement(values, self.smooth, self.window) <= self.tolerance
            for values in self._measured.values()
        )

    def progress(self) -> dict[str, Any]:
        place = {"epoch": self.epoch, "switched": self.switched}
        return {"policy": {**place, "stable_ranks": self.stable_ranks}}

    def resume(self, state: dict[str, Any]) -> None:
        policy = state["policy"]
        self.epoch, self.switched = policy["epoch"], policy["switched"]
        self._measured = {name: list(values) for name, values in policy["stable_ranks"].items()}


def _stable_rank(site: Site) -> float:
    """‖W‖²_F / ‖W‖²_2 of a dense site; 1 of a zero matrix."""
    return stable_rank(svd.energies(layouts.matrix(site.module).detach())) or 1.0


def estimate(shape: tuple[int, int], stable_ranks: Sequence[float]) -> int:
    """min(R, ⌈ξ · sr⌉), ξ = R / sr at the start."""
    full = min(shape)
    return max(1, min(full, math.ceil(full / stable_ranks[0] * stable_ranks[-1])))


def movement(values: Sequence[float], smooth: int, window: int) -> float:
    """Mean change an epoch of the exponential mean, over the last `window` epochs; inf before."""
    if len(values) <= window:
        return math.inf
    weight, means = 2 / (smooth + 1), [values[0]]
    for value in values[1:]:
        means.append(means[-1] + weight * (value - means[-1]))
    last = means[-window - 1 :]
    return sum(abs(b - a) for a, b in itertools.pairwise(last)) / window
