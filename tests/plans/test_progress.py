"""One bar for a call: all stages on it, in order, up to its end."""

from __future__ import annotations

from typing import Any

import pytest

import lowrank
from lowrank.plans import progress
from lowrank.plans.progress import Steps, expect, steps
from lowrank.plans.stages import recording, stage
from tests import zoo


class Bar:
    """Stands for tqdm, and remembers what it was told."""

    def __init__(self, **options: Any) -> None:
        self.options, self.n, self.texts, self.closed = options, 0.0, [], False
        self.places: list[float] = []

    def set_description_str(self, text: str, refresh: bool) -> None:
        self.texts.append(text)

    def update(self, count: float = 1) -> None:
        self.n += count
        self.places.append(self.n)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    made: list[Bar] = []

    def bar(**options: Any) -> Bar:
        made.append(Bar(**options))
        return made[-1]

    monkeypatch.setattr(progress, "_tqdm", bar)
    return made


def test_compress_shows_one_bar_with_all_its_stages(bars: list[Bar]) -> None:
    lowrank.compress(zoo.llama(), 0.7, data=zoo.tokens(32, 12), effort="fast")
    (bar,) = bars
    order = list(dict.fromkeys(text.split(":")[0] for text in bar.texts))
    assert order == [
        "calibration", "gradients", "decompositions", "choosing ranks", "factoring",
        "refit by block", "judging", "measuring errors",
    ]  # fmt: skip
    assert "refit by block: block 2 of 2" in bar.texts
    assert bar.places == sorted(bar.places)
    assert bar.n == pytest.approx(bar.options["total"])
    assert bar.closed


def test_without_progress_there_is_none(bars: list[Bar]) -> None:
    lowrank.compress(zoo.llama(), 0.7, data=zoo.tokens(32, 12), effort="fast", progress=False)
    assert all(bar.options.get("disable") for bar in bars)


def test_steps_inside_of_steps_do_not_count(bars: list[Bar]) -> None:
    with recording():
        expect(["factoring", "judging"])
        with stage("factoring"):
            for _ in steps(range(2), "layer", shown=True):
                with Steps(5, "token", shown=True) as inner:
                    inner.update(5)
    (bar,) = bars
    assert [text for text in bar.texts if "token" in text] == []
    half = bar.options["total"] * 25 / 35
    assert bar.places[1:3] == pytest.approx([half / 2, half])


def test_alone_steps_have_a_bar_of_their_own(bars: list[Bar]) -> None:
    assert list(steps("ab", "letter", shown=True)) == ["a", "b"]
    (bar,) = bars
    assert (bar.n, bar.options["desc"], bar.closed) == (2, "letter", True)


def test_an_unexpected_stage_leaves_the_bar(bars: list[Bar]) -> None:
    with recording():
        expect(["judging"])
        with stage("an own one"):
            list(steps("ab", "letter", shown=True))
        with stage("judging"):
            pass
    (bar,) = bars
    assert bar.places == pytest.approx([0, bar.options["total"]])
