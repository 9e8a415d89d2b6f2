"""The result of `sensitivity`: a table of layers and ratios."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import LowrankError
from ..tables import aligned


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """One row per layer, one column per ratio.

    Attributes:
        sites: names of the layers, in the model's order.
        ratios: shares kept of the one layer's own parameters.
        kl: mean KL(dense ‖ model with that layer compressed) in nats per position, (layers,
            ratios), float64; NaN if no rank is small enough.
        rank: rank of the layer at each ratio; 0 if there is none.
        error: share of the layer's energy lost, in the norm of the method.
        method: the method that the layers were factored by.
        positions: number of predictions compared.
        members: per row, the layers compressed together: one, except with a joint method.
        computed: False if the table was read from the cache.
    """

    sites: tuple[str, ...]
    ratios: tuple[float, ...]
    kl: Tensor
    rank: Tensor
    error: Tensor
    method: str
    positions: int
    members: tuple[tuple[str, ...], ...]
    computed: bool = True

    def at(self, ratio: float) -> dict[str, float]:
        """KL of every layer at one of the ratios, by layer name.

        Raises:
            LowrankError: that ratio was not measured.
        """
        if ratio not in self.ratios:
            raise LowrankError(f"measured at {self.ratios}, not at {ratio}")
        return dict(zip(self.sites, self.kl[:, self.ratios.index(ratio)].tolist(), strict=True))

    def rows(self) -> list[dict[str, str]]:
        """One row per layer, as text: the KL at every ratio, in nats per position."""
        return [
            {"site": name or "(root)",
             **{f"{r:g}": f"{v:.2e}" for r, v in zip(self.ratios, values, strict=True)}}
            for name, values in zip(self.sites, self.kl.tolist(), strict=True)
        ]  # fmt: skip

    def __str__(self) -> str:
        head = (
            f"KL in nats per position with one layer alone at that ratio ({self.method}), "
            f"{self.positions:,} positions"
        )
        return "\n".join([head, *aligned(self.rows())])
