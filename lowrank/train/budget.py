"""Ranks of all sites from one relative tolerance, itself found where a budget has to be met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import LowrankError
from ..linalg.retract import tail_rank

Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values (k,) of the core of a weight (out, in), descending."""

    shape: Shape
    values: Tensor


def stored(shape: Shape, rank: int) -> int:
    """Numbers that a weight of this rank takes: factors, or the dense one where that is less."""
    return min(rank * sum(shape), math.prod(shape))


def check_reachable(shapes: Sequence[Shape], ratio: float, least: int) -> None:
    """Raises LowrankError where even the smallest ranks are above the budget."""
    whole = sum(map(math.prod, shapes))
    smallest = sum(stored(shape, min(least, *shape)) for shape in shapes) / whole
    if smallest > ratio:
        raise LowrankError(
            f"ratio {ratio} cannot be reached: at min_rank {least} the chosen layers keep "
            f"{smallest:.4f}; lower min_rank, or choose other layers"
        )


def ranks_for(
    spectra: Sequence[Spectrum],
    tolerance: float,
    ratio: float | None,
    least: int,
    most: int | None,
) -> list[int]:
    """One rank a site: the tail that is cut stays within the tolerance, all within the budget.

    The tolerance is raised to the smallest one that meets the budget, by bisection; one number for
    all sites, as all tails are relative.
    """

    def at(theta: float) -> list[int]:
        return [_clamped(tail_rank(s.values, theta), s, least, most) for s in spectra]

    def size(theta: float) -> int:
        return sum(stored(s.shape, r) for s, r in zip(spectra, at(theta), strict=True))

    limit = math.inf if ratio is None else ratio * sum(math.prod(s.shape) for s in spectra)
    if size(tolerance) <= limit:
        return at(tolerance)
    low, high = tolerance, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if size(middle) <= limit else (middle, high)
    return at(high)


def _clamped(rank: int, spectrum: Spectrum, least: int, most: int | None) -> int:
    rank = min(rank, len(spectrum.values) if most is None else most)
    return min(max(rank, least), len(spectrum.values))
