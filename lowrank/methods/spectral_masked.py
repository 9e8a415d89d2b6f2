"""Sparsification that keeps the spectrum, without data: W ≈ L + S with ‖W − L − S‖₂ small.

"Neural Network Pruning as Spectrum Preserving Process" (arXiv 2307.08982) takes pruning for matrix
sparsification: keep the large entries, drop the small ones, draw from those between. Its sparse
matrix is S here; L, the few directions that S keeps worst, and the alternation are those of
`lowrank-masked`, in the metric of the weight itself (linalg/masked.py).

Drawing is an option and not the default: at every share of drawn entries the spectral error is
above that of the largest entries alone (benchmarks/spectral.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import linalg
from ..errors import LowrankError
from ..linalg.masked import Keep
from ..types import Statistics
from .lowrank_masked import LowRankMasked

NAME = "spectral-masked"


@dataclass(frozen=True)
class SpectralMasked(LowRankMasked):
    """Options: those of `LowRankMasked`, and `certain`, the share of kept entries that are the
    largest; the others are drawn with probability ∝ w², by `seed`. 1 draws none.

    Errors are of the weight, in the Frobenius norm; `lowrank.compare` gives the spectral ones.
    """

    certain: float = 1.0
    needs = frozenset[str]()
    measured = "weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.certain <= 1:
            raise LowrankError(f"certain must be a share in [0, 1], got {self.certain!r}")
        if self.certain < 1 and self.pattern != "unstructured":
            raise LowrankError(
                f"entries are drawn from the whole weight, which does not give {self.pattern!r}: "
                "leave certain at 1, or the pattern unstructured"
            )

    @property
    def name(self) -> str:
        """The name tells the pattern, since sizes do not."""
        if isinstance(self.pattern, str):
            return NAME
        return f"spectral-{self.pattern[0]}:{self.pattern[1]}"

    def _metric(self, stats: Statistics, in_features: int) -> Tensor | None:
        return None

    def _keep(self, count: int) -> Keep:
        if self.certain == 1:
            return super()._keep(count)
        return linalg.drawn(count, self.certain, self.seed)
