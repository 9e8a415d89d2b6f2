"""WeLore's rank selection (VITA-Group): one threshold on normalised singular values for all sites.

s̃ = (s − min s) / (max s − min s) per matrix; a site keeps #{j : s̃_j ≥ t}, at least 1. The
authors ship a table of thresholds for two models; here t is solved exactly for the budget, over the
sorted distinct values of all s̃. The gate is the true break-even, k(m + n) < mn, where theirs
compares rank counts (their 50 % leaves 79 % of LLaMA-2-7B's parameters). A constant spectrum, 0/0
in their code, is treated as the limit of a vanishing slope: s̃ falls evenly from 1 to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import LowrankError, listed
from ..types import Allocation, Budget, Curve, Probe
from .common import Choice, disjoint, gated, least_that_fits

Values = NDArray[np.float64]


@dataclass(frozen=True)
class WeLore:
    """The threshold is solved for the budget, or fixed by `threshold`."""

    threshold: float | None = None

    judges: ClassVar[bool] = False

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        by_sites = disjoint(curves)
        missing = [curve.sites[0] for curve in curves if curve.spectrum is None]
        if missing:
            raise LowrankError(f"welore needs singular values; no spectrum for {listed(missing)}")
        values = {sites: normalised(_numbers(curve)) for sites, curve in by_sites.items()}

        def choose(threshold: float) -> Choice:
            return {
                sites: gated(curve, kept(values[sites], threshold))
                for sites, curve in by_sites.items()
            }

        if self.threshold is not None:
            return choose(self.threshold)
        distinct = np.unique(np.concatenate(list(values.values()))).tolist()
        return least_that_fits(distinct, choose, budget, "welore")


def normalised(spectrum: Values) -> Values:
    """Min-max normalisation of descending singular values (k,) to [0, 1]; never NaN."""
    most, least = spectrum[0], spectrum[-1]
    if most - least <= most * len(spectrum) * np.finfo(np.float64).eps:
        return np.linspace(1.0, 0.0, len(spectrum)) if len(spectrum) > 1 else np.ones(1)
    return np.asarray((spectrum - least) / (most - least))


def kept(values: Values, threshold: float) -> int:
    """Number of normalised values that reach the threshold, at least one."""
    return max(1, int(np.count_nonzero(values >= threshold)))


def _numbers(curve: Curve) -> Values:
    assert curve.spectrum is not None
    return curve.spectrum.double().numpy()
