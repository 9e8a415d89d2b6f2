"""Ranks of all sites from one relative tolerance, itself found where a budget has to be met."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...errors import LowrankError
from ...linalg.retract import tail_rank

Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class CoreValues:
    """Singular values (k,) of the core of a weight (out, in), descending."""

    shape: Shape
    values: Tensor


def matrix_params(shape: Shape, rank: int) -> int:
    """Numbers that a weight of this rank takes: factors, or the dense one where that is less."""
    return min(rank * sum(shape), math.prod(shape))


def check_ratio(smallest: int, whole: int, ratio: float, least: int) -> None:
    """Raises LowrankError where even the smallest ranks are above the budget.

    Args:
        smallest: numbers that all sites take at rank `least`; whole: what they take dense.
    """
    if smallest > ratio * whole:
        raise LowrankError(
            f"ratio {ratio} cannot be reached: at min_rank {least} the chosen layers keep "
            f"{smallest / whole:.4f}; lower min_rank, or choose other layers"
        )


def least_tolerance(size: Callable[[float], int], tolerance: float, limit: float) -> float:
    """The smallest tolerance, from the given one up to 1, at which `size` is within the limit.

    By bisection: `size` must not grow with its argument, and be within the limit at 1.
    """
    if size(tolerance) <= limit:
        return tolerance
    low, high = tolerance, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if size(middle) <= limit else (middle, high)
    return high


def ranks_for(
    cores: Sequence[CoreValues],
    tolerance: float,
    ratio: float | None,
    least: int,
    most: int | None,
) -> list[int]:
    """One rank a site: the tail that is cut stays within the tolerance, all within the budget.

    The tolerance is raised to the smallest one that meets the budget; one number for all sites, as
    all tails are relative.
    """

    def ranks_within(theta: float) -> list[int]:
        return [rank_at(core.values, theta, least, most) for core in cores]

    def size(theta: float) -> int:
        ranks = ranks_within(theta)
        return sum(matrix_params(c.shape, rank) for c, rank in zip(cores, ranks, strict=True))

    limit = math.inf if ratio is None else ratio * sum(math.prod(c.shape) for c in cores)
    return ranks_within(least_tolerance(size, tolerance, limit))


def rank_at(values: Tensor, tolerance: float, least: int, most: int | None) -> int:
    """Of singular values (k,), descending: a tail within the tolerance, a rank within limits."""
    rank = min(tail_rank(values, tolerance), len(values) if most is None else most)
    return min(max(rank, least), len(values))
