"""Cuttlefish: train dense until the ranks have settled, then factored at the ranks found.

arXiv 2305.02538. After every epoch the stable rank sr = Σσ²/σ²_max of each layer is taken; times
ξ = R / sr(at the start), R = min(out, in), it estimates the rank: what is random counts as full.
Once the smoothed stable ranks of all layers stand still, each layer is factored at

    r = min(R, ⌈ξ · sr⌉).

Against the authors' code: stable ranks stay real numbers (there they are cut to integers before
they are compared), and no layer is chosen by its position (there by profiling on a GPU): leave
layers out by `exclude_modules`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import LowrankError
from ..linalg import svd
from ..types import Site
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns
from .parts.switching import Switching


class Cuttlefish(Switching):
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
            LowrankError: an option is out of range, or what `Attachment` refuses.
        """
        if not tolerance > 0:
            raise LowrankError(f"tolerance is a change of rank an epoch, above 0, got {tolerance}")
        if min(window, smooth, min_epochs) < 1:
            got = f"{window}, {smooth} and {min_epochs}"
            raise LowrankError(f"window, smooth and min_epochs must be at least 1, got {got}")
        if max_epochs is not None and max_epochs < min_epochs:
            raise LowrankError(f"need min_epochs <= max_epochs, got {min_epochs} and {max_epochs}")
        self.tolerance, self.window, self.smooth = tolerance, window, smooth
        self.min_epochs, self.max_epochs = min_epochs, max_epochs
        super().__init__(model, optimizer, frobenius_decay, target_modules, exclude_modules)
        self._seen = {site.name: [stable_rank(site)] for site in self._at.sites}

    @property
    def stable_ranks(self) -> dict[str, list[float]]:
        """Of every layer: at the start and after each dense epoch."""
        return {name: list(values) for name, values in self._seen.items()}

    def _ranks(self) -> dict[str, int] | None:
        for site in self._at.sites:
            self._seen[site.name].append(stable_rank(site))
            self._at.note("rank", site.name, stable_rank=self._seen[site.name][-1])
        settled = all(
            movement(values, self.smooth, self.window) <= self.tolerance
            for values in self._seen.values()
        )
        late = self.max_epochs is not None and self.epoch >= self.max_epochs
        if not (late or (settled and self.epoch >= self.min_epochs)):
            return None
        return {site.name: estimate(site.shape, self._seen[site.name]) for site in self._at.sites}

    def _policy(self) -> dict[str, Any]:
        return {**super()._policy(), "stable_ranks": self.stable_ranks}

    def _take(self, policy: dict[str, Any]) -> None:
        super()._take(policy)
        self._seen = {name: list(values) for name, values in policy["stable_ranks"].items()}


def stable_rank(site: Site) -> float:
    """‖W‖²_F / ‖W‖²_2 of a dense site; 1 of a zero matrix."""
    energies = svd.energies(layouts.matrix(site.module).detach())
    largest = float(energies[0])
    return float(energies.sum()) / largest if largest > 0 else 1.0


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
