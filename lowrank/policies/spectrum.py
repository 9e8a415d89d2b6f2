"""Least total error under the budget, from the sites' own error curves.

Comparing raw errors across sites is worse than uniform on language models and much better on
convolutional networks: see benchmarks. Norms are never mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..types import Allocation, Budget, Curve, Probe
from . import knapsack


@dataclass(frozen=True)
class Spectrum:
    """The allocation of least total error; no options."""

    judges: ClassVar[bool] = False

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        return knapsack.solve(curves, budget).choice
