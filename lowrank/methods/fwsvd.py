"""FWSVD: plain SVD with every row weighted by its Fisher information (arXiv 2207.00112).

min ‖D^½ (W − up·down)‖_F with D = diag of the rows' importance: their squared gradients, summed
over the row. A baseline: it knows nothing of the inputs. Where the authors take the labels of the
task, ours are drawn from the model (the true Fisher); rows without any gradient keep a floor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .. import layouts, linalg
from ..errors import LowrankError
from ..types import Curve, Option, Site, Statistics
from .common import low_rank_curve, low_rank_layer, rank_of

FLOOR = 1e-6  # of the mean importance


@dataclass(frozen=True)
class FWSVD:
    """Options: `seed` of the sketch that very large matrices use at small ranks."""

    seed: int = 0
    kinds = frozenset({"linear"})
    needs = frozenset({"row_fisher"})

    def curve(self, site: Site, stats: Statistics) -> Curve:
        root = _root(stats, site.shape[0])
        weight = layouts.matrix(site.module).detach().double()
        energy = linalg.energies(root[:, None] * weight)
        return low_rank_curve(
            site,
            "fwsvd",
            linalg.tails(energy).tolist(),
            spectrum=energy.sqrt().cpu(),
            norm="row-fisher",
            exact=True,
        )

    def factor(self, module: nn.Module, option: Option, stats: Statistics) -> nn.Module:
        root = _root(stats, layouts.matrix(module).shape[0])
        weighted = root[:, None] * layouts.matrix(module).detach().double()
        up, down = linalg.factor(weighted, rank_of(option, module), seed=self.seed)
        up, down = linalg.balance(up / root.to(up)[:, None], down)
        return low_rank_layer(module, down, up, option)

    def error(self, module: nn.Module, weight: Tensor, stats: Statistics) -> float:
        """‖D^½ (W − Ŵ)‖² of any Ŵ (out, in), in the norm of the curve."""
        off = layouts.matrix(module).detach().double() - weight.detach().double()
        return float((_root(stats, off.shape[0])[:, None] * off).square().sum())


def _root(stats: Statistics, rows: int) -> Tensor:
    """D^½ (out,), float64, every entry positive."""
    if stats.row_fisher is None or len(stats.row_fisher) != rows:
        got = "none" if stats.row_fisher is None else len(stats.row_fisher)
        raise LowrankError(
            f"expected the Fisher information of {rows} rows, got {got}: calibrate with fisher=True"
        )
    fisher = stats.row_fisher.double()
    mean = float(fisher.mean())
    return fisher.clamp(min=FLOOR * mean if mean > 0 else 1.0).sqrt()
