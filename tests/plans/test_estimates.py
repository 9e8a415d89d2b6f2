"""What an estimate prints, and what it adds up."""

from __future__ import annotations

import pytest

from lowrank.plans.estimates import Estimate, Expected, lasting

GIB = 1 << 30
ESTIMATE = Estimate(
    model="Net", layers=3, params=1_000_000, targeted=800_000, kept=600_000, rows=8, length=32,
    from_disk=GIB // 2, in_memory=3 * GIB // 4, available=16 * GIB, scratch=GIB // 4,
    output=2 * GIB, notes=("one more thing",),
    stages=(
        Expected("loading", None, None),
        Expected("calibration", 2.5e9, 30.0),
        Expected("factoring", 1.5e9, 90.0),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0123, "0.012 s"), (42.4, "42 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_durations_are_said_in_fitting_units(seconds: float, said: str) -> None:
    assert lasting(seconds) == said


def test_seconds_are_those_of_the_stages_that_are_known() -> None:
    assert ESTIMATE.seconds == 120.0


def test_an_estimate_is_printed_whole() -> None:
    assert str(ESTIMATE).splitlines() == [
        "Net: 1,000,000 parameters, 800,000 in 3 targets; about 600,000 are kept",
        "data: 8 rows of 32 tokens",
        "memory in no file: 0.50 GiB from disk, 0.75 GiB in memory; 16.00 GiB are available",
        "disk: 0.25 GiB of scratch files from disk, 2.00 GiB of output",
        "stage        FLOPs          time",
        "loading      not estimated",
        "calibration  2.5e+09        30 s",
        "factoring    1.5e+09        2 min",
        "time: about 2 min on this machine, without loading",
        "one more thing",
    ]
