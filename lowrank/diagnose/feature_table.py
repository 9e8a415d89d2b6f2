"""The result of `features`: a table of what every layer reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..linalg import Collapse
from ..plans.plan import versions
from ..tables import aligned
from .spectrum import EMPTY, LayerSpectrum, percent


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """The features that one layer reads.

    Attributes:
        width: number of features; the channels of a convolution.
        positions: number of vectors read, without padding.
        spectrum: of their covariance; None if the data did not reach the layer.
        zeros: share of numbers that are exactly zero.
        near: share at most a hundredth of the root mean square of their own vector, zeros too.
        dropped: share that can be zeroed in all layers at once at the loss that was asked for.
        collapse: neural collapse, where labels were given and rows can be told apart.
        local: local rank of the layer's output by relative threshold, mean over examples.
        reason: why there are no figures; "" otherwise.
    """

    name: str
    width: int
    positions: int = 0
    spectrum: LayerSpectrum | None = None
    zeros: float = 0.0
    near: float = 0.0
    dropped: float | None = None
    collapse: Collapse | None = None
    local: Mapping[float, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def title(self) -> str:
        return self.name or "(root)"


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """One row per layer, in the model's order.

    Attributes:
        rows_read: rows of data.
        loss: what `dropped` may cost, in the unit `measure`; None if it was not asked for.
        probes: directions of the local rank, which is at most that; 0 if it was not asked for.
        thresholds: of the local rank, relative to its largest singular value.
    """

    sites: tuple[LayerFeatures, ...]
    rows_read: int
    loss: float | None = None
    measure: str = ""
    probes: int = 0
    thresholds: tuple[float, ...] = ()

    def rows(self) -> list[dict[str, str]]:
        """One row per layer, as text."""
        return [self._row(site) for site in self.sites]

    def to_json(self) -> str:
        """All figures; NaN is null."""
        body = {
            "format": "lowrank-features", "version": 1, "rows": self.rows_read, "loss": self.loss,
            "measure": self.measure, "probes": self.probes, "versions": versions(),
            "sites": [*map(_figures, self.sites)],
        }  # fmt: skip
        return json.dumps(body, indent=1, allow_nan=False)

    def __getitem__(self, name: str) -> LayerFeatures:
        return next(site for site in self.sites if site.name == name)

    def __str__(self) -> str:
        return "\n".join([f"features that layers read, {self.rows_read:,} rows of data",
                          *aligned(self.rows())])  # fmt: skip

    def _row(self, site: LayerFeatures) -> dict[str, str]:
        seen = site.spectrum is not None
        spectrum = EMPTY if site.spectrum is None else site.spectrum.row()
        near, gone = site.collapse, site.dropped
        return {
            "site": site.title,
            "width": str(site.width),
            **{name: spectrum[name] for name in ("eff", "eff σ", "stable", percent(0.99))},
            "zero": percent(site.zeros) if seen else "",
            "near 0": percent(site.near) if seen else "",
            "dropped": "" if gone is None else percent(gone),
            **{f"local {t:g}": self._local(site, t) for t in self.thresholds},
            "NC1": "" if near is None else f"{near.within:.3g}",
            "NC2 norms": "" if near is None else f"{near.norms:.3f}",
            "NC2 angles": "" if near is None else f"{near.angles:.3f}",
            "reason": site.reason,
        }

    def _local(self, site: LayerFeatures, threshold: float) -> str:
        """A rank that uses up the probes is a lower bound."""
        if threshold not in site.local:
            return ""
        rank = site.local[threshold]
        return f"≥{self.probes}" if rank >= self.probes else f"{rank:.1f}"


def _figures(site: LayerFeatures) -> dict[str, Any]:
    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    near = site.collapse
    return {
        "site": site.name,
        "width": site.width,
        "positions": site.positions,
        "spectrum": None if site.spectrum is None else site.spectrum.figures(),
        "zeros": site.zeros,
        "near": site.near,
        "dropped": site.dropped,
        "collapse": None if near is None else {k: known(v) for k, v in near._asdict().items()},
        "local_rank": {f"{t:g}": rank for t, rank in site.local.items()},
        "reason": site.reason,
    }
