"""Positions per layer, which MACs budgets count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..calibration.statistics import Calibration, statistics_of
from ..types import Curve, Site


def repeat_counts(sites: Sequence[Site], calibration: Calibration | None) -> dict[str, int]:
    """Output positions of each layer, relative to the least-used layer and rounded, by name.

    Layers that the data did not reach are left out and count once, as all do without data.
    """
    counts = {site.name: statistics_of(site, calibration).count for site in sites}
    counts = {name: count for name, count in counts.items() if count}
    least = min(counts.values(), default=1)
    return {name: max(round(count / least), 1) for name, count in counts.items()}


def counted(sites: Sequence[Site], times: Mapping[str, int]) -> list[Site]:
    """The sites, each with its cost times its number of positions."""
    return [replace(site, cost=site.cost.often(times.get(site.name, 1))) for site in sites]


def often(curve: Curve, times: int) -> Curve:
    """The curve with all costs times a number of positions."""
    if times == 1:
        return curve
    options = tuple(replace(o, cost=o.cost.often(times)) for o in curve.options)
    return replace(curve, options=options)
