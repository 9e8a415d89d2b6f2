"""The spectrum of one layer: effective ranks, ranks by energy, condition number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from .. import linalg

SHARES = (0.90, 0.95, 0.99)


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The energies (squared singular values) of W, or of W H^½, descending, (k,) float64."""

    energy: Tensor

    @property
    def values(self) -> Tensor:
        """Singular values, descending."""
        return self.energy.sqrt()

    @cached_property
    def effective_rank(self) -> float:
        """exp of the entropy of the energies; the one to choose ranks by."""
        return linalg.effective_rank(self.energy)

    @cached_property
    def entropy_rank(self) -> float:
        """exp of the entropy of the singular values themselves (Roy and Vetterli)."""
        return linalg.entropy_rank(self.energy)

    @cached_property
    def stable_rank(self) -> float:
        """Sum of the energies over the largest one."""
        return linalg.stable_rank(self.energy)

    @cached_property
    def condition(self) -> float:
        """Condition number: largest over smallest singular value; inf if that is below rounding."""
        return linalg.condition_number(self.energy)

    def rank_for(self, share: float) -> int:
        """The smallest rank that keeps this share of the energy."""
        return linalg.rank_for(share, self.energy)

    def row(self) -> dict[str, str]:
        """Figures as text, for tables."""
        return {
            "eff": f"{self.effective_rank:.1f}",
            "eff σ": f"{self.entropy_rank:.1f}",
            "stable": f"{self.stable_rank:.1f}",
            **{percent(share): str(self.rank_for(share)) for share in SHARES},
            "cond": "inf" if math.isinf(self.condition) else f"{self.condition:.0e}",
        }

    def figures(self) -> dict[str, Any]:
        """Figures as numbers, for JSON; an infinite condition number is null."""
        return {
            "effective_rank": self.effective_rank,
            "entropy_rank": self.entropy_rank,
            "stable_rank": self.stable_rank,
            "condition": None if math.isinf(self.condition) else self.condition,
            "rank_for": {f"{share:g}": self.rank_for(share) for share in SHARES},
        }


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


EMPTY = dict.fromkeys(("eff", "eff σ", "stable", *map(percent, SHARES), "cond"), "")
