"""Paired timing: on a noisy machine only ratios of alternating timings are meaningful."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


@torch.no_grad()
def paired_ratio(
    one: Callable[[], object], other: Callable[[], object], pairs: int = 15, least_s: float = 0.002
) -> float:
    """Median of time(one) / time(other) over alternating pairs, each of at least `least_s`."""
    repeats = 1
    while _time(other, repeats) < least_s and repeats < 1024:
        repeats *= 2
    _time(one, repeats)
    return statistics.median(_time(one, repeats) / _time(other, repeats) for _ in range(pairs))


@torch.no_grad()
def paired_ms(
    one: Callable[[], object], other: Callable[[], object], pairs: int = 7, least_s: float = 0.002
) -> tuple[float, float]:
    """Median milliseconds per call of each, timed alternately."""
    repeats = 1
    while _time(one, repeats) < least_s and repeats < 1024:
        repeats *= 2
    _time(other, repeats)
    times = [(_time(one, repeats), _time(other, repeats)) for _ in range(pairs)]
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return 1e3 * first / repeats, 1e3 * second / repeats


def _time(call: Callable[[], object], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
