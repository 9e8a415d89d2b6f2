"""How fast this machine multiplies and decomposes matrices: seconds of work, for estimates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

ENOUGH = 0.1  # seconds that a measurement should take
LEAST_ROWS, MOST_ROWS = 64, 1024  # of few rows, a product is as slow as reading the weight
SIDE = 512  # of the matrices that are decomposed


@dataclass(frozen=True)
class Rates:
    """Work a second, measured.

    Attributes:
        product: FLOPs of products in the model's dtype.
        single, double: FLOPs of products in float32 and float64.
        values, vectors: n³ of an eigenproblem of size n in float64, without and with eigenvectors.
    """

    product: float
    single: float
    double: float
    values: float
    vectors: float


@torch.no_grad()
def measured_rates(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Rates:
    """Rates by one product of the given shape, as a linear layer of it computes it (other products
    in 16 bits may be a hundred times slower), and by eigenproblems of size `SIDE`. Takes few
    seconds: rows are added while they cost little.

    Args:
        dtype: of the model; float32 and float64 are measured in any case.
    """

    def multiplied(kind: torch.dtype, inner: int, outer: int) -> float:
        weight = torch.randn(outer, inner, device=device).to(kind)
        rows = LEAST_ROWS
        while True:
            left = torch.randn(rows, inner, device=device).to(kind)
            seconds = seconds_of(lambda left=left: linear(left, weight))  # type: ignore[misc]
            if seconds >= ENOUGH or rows >= MOST_ROWS:
                return 2 * rows * inner * outer / seconds
            rows *= 4

    square = torch.randn(SIDE, SIDE, dtype=torch.float64, device=device)
    square = square @ square.T
    return Rates(
        product=multiplied(dtype, in_features, out_features),
        single=multiplied(torch.float32, in_features, min(in_features, 1024)),
        double=multiplied(torch.float64, SIDE, SIDE),
        values=SIDE**3 / seconds_of(lambda: torch.linalg.eigvalsh(square)),
        vectors=SIDE**3 / seconds_of(lambda: torch.linalg.eigh(square)),
    )


def seconds_of(call: Callable[[], object], enough: float = ENOUGH) -> float:
    """Seconds of one call: the median of several if they are short, after one that is not timed."""
    call()
    times: list[float] = []
    while sum(times) < enough:
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(max(time.perf_counter() - started, 1e-9))
    return statistics.median(times)
