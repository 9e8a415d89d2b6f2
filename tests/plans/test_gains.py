"""What stages gained: the chain of figures, rates, and what is not known."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import pytest

import lowrank
from lowrank import LowrankError, Report
from lowrank.page.document import html
from lowrank.plans.gains import Course, Gain
from tests.zoo import mlp


def test_each_stage_begins_where_the_one_before_ended(caplog: pytest.LogCaptureFixture) -> None:
    course = Course("KL")
    assert not course.unjudged
    course.judged(0.9)  # before any stage: that is given at the end
    course.passed("refit", 30)
    assert course.unjudged
    course.judged(0.5)
    assert not course.unjudged
    course.passed("norms", 6)
    course.judged(0.5)
    course.passed("distillation", 120, steps=40)
    part = Gain("blocks", "error", 3.0, 2.0, 12, 7)
    with caplog.at_level(logging.INFO, logger="lowrank"):
        gains = course.gains(0.8, 0.2, part)
    assert gains == (
        Gain("refit", "KL", 0.8, 0.5, 30),
        part,
        Gain("norms", "KL", 0.5, 0.5, 6),
        Gain("distillation", "KL", 0.5, 0.2, 120, 40),
    )
    assert [gain.per_minute for gain in gains] == pytest.approx([0.6, 5.0, 0.0, 0.15])
    assert caplog.messages[0] == "refit: KL 0.8 -> 0.5 in 0.50 minutes, 0.6 a minute"
    assert len(caplog.messages) == 4


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_no_gain(bad: float) -> None:
    course = Course("KL")
    course.passed("refit", 30)
    course.judged(0.5)
    course.passed("distillation", 60, 40)
    assert [gain.stage for gain in course.gains(bad, 0.2)] == ["distillation"]


def test_a_rate_of_hardly_any_time_is_that_of_a_second() -> None:
    assert Gain("refit", "KL", 0.5, 0.4, 0.0).per_minute == pytest.approx(6)


def test_a_report_tells_and_keeps_them() -> None:
    _, report = lowrank.compress(mlp(24, 16), 0.5, data=None, progress=False)
    assert report.gains == ()
    assert "gained a minute" not in str(report) + html(report)
    gain = Gain("distillation", "KL", 0.5, 0.2, 120.0, 40)
    report = replace(report, gains=(gain,))
    assert Report.from_json(report.to_json()) == report
    for text in (str(report), html(report)):
        for word in ("gained a minute", *gain.row().values()):
            assert word in text
    body = json.loads(report.to_json())
    assert [*body["gains"][0]] == ["stage", "measure", "before", "after", "seconds", "steps"]
    older = {key: value for key, value in body.items() if key != "gains"}
    assert Report.from_json(json.dumps(older)).gains == ()
    body["gains"][0]["before"] = -1
    with pytest.raises(LowrankError, match="a gain of the report: before must be a number >= 0"):
        Report.from_json(json.dumps(body))
