"""Paired timing: a ratio of two calls, measured in turn."""

from __future__ import annotations

import pytest
import torch

from lowrank.measure import timing


def test_short_calls_are_repeated_until_they_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a clock that ticks once for every call of `other` and twice for one of `one`."""
    now = 0.0
    calls = {"one": 0, "other": 0}

    def tick(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        calls[name] += 1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    ratio = timing.paired_ratio(
        lambda: tick("one", 2e-4), lambda: tick("other", 1e-4), pairs=3, least_s=1e-3
    )
    assert ratio == pytest.approx(2)
    assert calls["one"] == 4 * 16  # 16 calls take 1.6 ms; once to warm up, then three pairs


def test_nothing_is_recorded_for_gradients() -> None:
    weight = torch.ones(2, requires_grad=True)
    seen = []
    timing.paired_ratio(
        lambda: seen.append((weight * 2).requires_grad), lambda: None, pairs=1, least_s=0
    )
    assert seen
    assert not any(seen)


def test_milliseconds_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def tick(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    found = timing.paired_ms(lambda: tick(2e-4), lambda: tick(1e-4), pairs=3, least_s=1e-3)
    assert found == pytest.approx((0.2, 0.1))
