"""Speed of this machine, with a clock of the test's own."""

from __future__ import annotations

import pytest
import torch

from lowrank.measure import rates


class Clock:
    """A clock that stands still but for what the measured call adds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr(rates.time, "perf_counter", lambda: self.now)

    def takes(self, *seconds: float) -> object:
        waiting = list(seconds)

        def call() -> None:
            self.calls += 1
            self.now += waiting.pop(0) if len(waiting) > 1 else waiting[0]

        return call


def test_the_first_call_is_not_timed_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert rates.seconds_of(clock.takes(9.0, 0.03, 0.5, 0.02), enough=0.545) == pytest.approx(0.03)
    assert clock.calls == 4


def test_a_long_call_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert rates.seconds_of(clock.takes(2.0)) == 2.0
    assert clock.calls == 2


def test_rates_are_work_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "seconds_of", lambda call: (call(), 0.5)[1])
    found = rates.measured_rates(40, 24, torch.bfloat16)
    side = rates.SIDE
    assert found.product == 2 * 64 * 24 * 40 / 0.5
    assert found.single == 2 * 64 * 24 * 24 / 0.5
    assert found.double == 2 * 64 * side * side / 0.5
    assert found.values == found.vectors == side**3 / 0.5


def test_rows_are_added_while_they_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(rates, "seconds_of", lambda call: asked.append(len(call())) or 1e-3)
    found = rates.measured_rates(40, 24, torch.float32)
    assert asked[:3] == [64, 256, 1024]
    assert found.product == pytest.approx(2 * 1024 * 24 * 40 / 1e-3)
