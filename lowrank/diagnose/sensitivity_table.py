"""What `sensitivity` gives: a table of layers and ratios."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import LowrankError
from ..tables import aligned


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """One row a layer, one column a ratio.

    Attributes:
        sites: names of the layers, in the model's order.
        ratios: share that the one layer keeps of its own parameters.
        kl: mean KL(dense ‖ model with that layer reduced) in nats per position, float64; NaN where
            no rank is that small.
        rank: the rank that the ratio stands for; 0 where there is none.
        error: share of the layer's energy lost, in the norm of the method.
        method: what the layers were factored by.
        positions: how many predictions were compared.
        members: by row, the layers that are reduced together: one, but for a joint method.
        computed: False when it was read from the cache.
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
        """KL of every layer at one of the ratios.

        Raises:
            LowrankError: it was not measured.
        """
        if ratio not in self.ratios:
            raise LowrankError(f"measured at {self.ratios}, not at {ratio}")
        return dict(zip(self.sites, self.kl[:, self.ratios.index(ratio)].tolist(), strict=True))

    def rows(self) -> list[dict[str, str]]:
        """One row a layer, as text: the KL at every ratio, in nats per position."""
        return [
            {"site": name or "(root)",
             **{f"{r:g}": f"{v:.2e}" for r, v in zip(self.ratios, values, strict=True)}}
            for name, values in zip(self.sites, self.kl.tolist(), strict=True)
        ]  # fmt: skip

    def __str__(self) -> str:
        head = (
            f"KL in nats per position when one layer alone keeps that share ({self.method}), "
            f"{self.positions:,} positions"
        )
        return "\n".join([head, *aligned(self.rows())])
