"""Ranks proportional to the number of components above the noise of each weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..errors import LowrankError, listed
from ..linalg import evbmf_count
from ..types import Allocation, Budget, Curve, Option, Probe
from .common import Choice, disjoint, least_that_fits

GRID = 1024  # multiples of the estimated ranks to try, evenly in the logarithm


@dataclass(frozen=True)
class EVBMF:
    """The rank of each site by empirical variational Bayes (linalg/evbmf.py; used by Kim et al.,
    arXiv 1511.06530, for convolutions), times one common factor: the largest that fits the budget.
    A site gets the smallest option with no more error than that many leading components.

    Attributes:
        least: fewest components that a site keeps.
    """

    least: int = 1

    judges: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.least < 1:
            raise LowrankError(f"EVBMF keeps at least one component, got least={self.least}")

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        """Raises LowrankError if a curve has no spectrum: its method decomposes no matrix."""
        by_sites = disjoint(curves)
        missing = [curve.sites[0] for curve in curves if curve.spectrum is None]
        if missing:
            raise LowrankError(
                f"evbmf estimates ranks from singular values, and {listed(missing, 4)} have none: "
                "use another method or policy"
            )
        ranks = {sites: self._rank(curve) for sites, curve in by_sites.items()}
        most = max(_length(curve) / ranks[s] for s, curve in by_sites.items())
        step = (most * max(ranks.values())) ** (1 / GRID)

        def choose(level: float) -> Choice:
            times = most / step**level
            return {
                sites: _within(curve, max(round(times * ranks[sites]), self.least))
                for sites, curve in by_sites.items()
            }

        return least_that_fits(list(range(GRID + 1)), choose, budget, "evbmf")

    def _rank(self, curve: Curve) -> int:
        assert curve.spectrum is not None
        long = curve.dense.cost.params // len(curve.spectrum)
        return evbmf_count(curve.spectrum.square(), long, least=self.least)


def _within(curve: Curve, rank: int) -> Option:
    """The smallest option that loses no more than the components after the first `rank`."""
    assert curve.spectrum is not None
    if rank >= len(curve.spectrum):
        return curve.dense
    lost = float(curve.spectrum[rank:].square().sum()) + 1e-9 * curve.total
    return curve.options[next(i for i, error in enumerate(curve.errors) if error <= lost)]


def _length(curve: Curve) -> int:
    return 0 if curve.spectrum is None else len(curve.spectrum)
