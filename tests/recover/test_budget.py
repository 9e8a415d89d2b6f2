"""Training by the clock: numbers of steps, shares of the time, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, Recovery, Report
from lowrank.recover import budget, training
from lowrank.recover.budget import SPARE, Budget, fit_within
from lowrank.recover.journal import Journal
from lowrank.recover.training import Training
from lowrank.recover.written import written_until
from tests import zoo

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
KEPT = 1 - SPARE


class Clock:
    """Moves only where a test says so."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(budget, "clock", fake)
    return fake


class Line:
    """y = 3x, from a slope of 1; a step takes a second, or what is given."""

    def __init__(self, clock: Clock, seconds: float = 1.0, floor: float = 0.0) -> None:
        self.clock, self.seconds, self.floor = clock, seconds, floor
        self.slope = nn.Parameter(torch.ones(1))
        self.steps = self.looks = 0

    def __call__(self, batch: int) -> Tensor:
        if torch.is_grad_enabled():
            self.clock.time += self.seconds
            self.steps += 1
        else:
            self.looks += 1
        x = torch.linspace(-1, 1, 8) * (1 + batch)
        return (self.slope * x - 3 * x).square().mean().clamp(min=self.floor)

    def fitted(self, seconds: float | None, steps: int = 40, rate: float = 0.02) -> Any:
        return fit_within([self.slope], self, [0, 1, 2], [3], Training(steps, rate), seconds)


def test_without_a_limit_the_steps_are_those_asked_for(clock: Clock) -> None:
    line = Line(clock)
    assert line.fitted(None).steps == line.steps == 40


def test_a_run_ends_on_time_and_its_schedule_with_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []
    schedule = training._schedule

    def noted(step: int, steps: int) -> float:
        rates.append(schedule(step, steps))
        return rates[-1]

    monkeypatch.setattr(training, "_schedule", noted)
    line = Line(clock, seconds=2.0)
    came = line.fitted(50)
    assert came.steps == line.steps == 25
    assert clock.time == 50
    assert came.after < came.before
    assert max(rates) > 0.95
    assert rates[-1] == pytest.approx(0.1, abs=1e-6)


def test_more_steps_than_usual_where_less_than_a_second_run_would_fit(clock: Clock) -> None:
    line = Line(clock)
    assert line.fitted(70).steps == line.steps == 70


def test_steps_that_become_slower_still_end_on_time(clock: Clock) -> None:
    line = Line(clock)

    def slower(batch: int) -> Tensor:
        line.seconds = 1.0 if line.steps < 10 else 3.0
        return line(batch)

    came = fit_within([line.slope], slower, [0, 1, 2], [3], Training(40, 0.02), 60)
    assert 57 < clock.time <= 60
    assert came.steps == line.steps == 10 + 16


def test_runs_follow_while_they_gain(clock: Clock) -> None:
    """40, 80 and 160 steps; what is left is less than twice 320."""
    line = Line(clock)
    came = line.fitted(700, rate=1e-4)
    assert came.steps == line.steps == 700
    assert clock.time == 700
    assert came.before == pytest.approx(4 * 16 * (torch.linspace(-1, 1, 8) ** 2).mean().item())
    assert came.best_step == 700
    with torch.no_grad():
        assert float(line(3)) == pytest.approx(came.after)


def test_training_stops_when_the_held_out_loss_falls_no_more(clock: Clock) -> None:
    line = Line(clock, floor=60.0)  # of about 27 at the start already: nothing can be gained
    came = line.fitted(700)
    assert came.steps == 40
    assert not came.kept
    assert line.slope.tolist() == [1]


def test_no_model_is_looked_at_twice_between_runs(clock: Clock) -> None:
    line = Line(clock)
    line.fitted(40 + 80 + 159, steps=40, rate=1e-4)
    assert line.looks == 1 + 3 * (6 + 1)  # once before; of each run six checks and the end
    assert clock.time == 279


# Shares


def shares(clock: Clock, *, minutes: float, blocks: int, closed: float, **steps: int) -> list[Any]:
    """What each block and distillation are given, if all take what they are given."""
    own = Budget(Recovery(minutes=minutes, **steps), blocks, spent=60.0)
    found = []
    for _ in range(blocks):
        clock.time += closed
        found.append(own.of_block())
        clock.time += found[-1]
        own.trained(found[-1])
    return [*found, own.of_distillation(), own.notes()]


def test_what_the_closed_form_leaves_is_shared_by_steps(clock: Clock) -> None:
    *blocks, last, notes = shares(
        clock, minutes=20, blocks=4, closed=30, block_steps=100, distill_steps=500
    )
    left = 1200 * KEPT - 60 - 4 * 30
    assert blocks == pytest.approx([left / 4 / 6] * 4)
    assert last == pytest.approx(left * 5 / 6)
    assert notes == []


def test_time_that_a_block_does_not_use_falls_to_the_others(clock: Clock) -> None:
    own = Budget(Recovery(minutes=10, block_steps=100, distill_steps=200), 2, spent=0.0)
    first = own.of_block()
    second = own.of_block()
    assert first == pytest.approx(600 * KEPT * 100 / (200 + 400))
    assert second == pytest.approx(600 * KEPT * 100 / (100 + 400))
    assert own.of_distillation() == pytest.approx(600 * KEPT)


def test_a_time_too_short_is_told(clock: Clock) -> None:
    *given, notes = shares(
        clock, minutes=0.5, blocks=2, closed=30, block_steps=100, distill_steps=500
    )
    assert given == [0, 0, 0]
    assert notes == [
        "0.5 minutes were too few for the closed form, which always runs whole: nothing was trained"
    ]


def test_what_was_left_out_is_told(clock: Clock) -> None:
    own = Budget(Recovery(minutes=10, block_steps=100, distill_steps=200), 2, spent=0.0)
    own.of_block()
    own.trained(50.0)
    clock.time = 600
    assert own.of_block() == own.of_distillation() == 0
    assert own.notes() == ["no time of 10 minutes was left for 1 blocks and distillation"]


def test_time_of_a_call_that_was_killed_counts(clock: Clock) -> None:
    recovery = Recovery(minutes=10, block_steps=100, distill_steps=100)
    first = Budget(recovery, 2, spent=20.0)
    clock.time += 10
    first.trained(6.0)
    kept = first.state()
    clock.time += 1000  # killed
    again = Budget(recovery, 2, spent=5.0)
    again.restored(kept)
    assert again.training == 6
    assert again.of_distillation() == pytest.approx(600 * KEPT - 35)


def test_writing_takes_a_part_of_the_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def write(_model: Any, *, rows: int, length: int, seed: int) -> Tensor:
        seeds.append(seed)
        clock.time += 10
        return torch.full((rows, length), seed)

    monkeypatch.setattr("lowrank.calibration.self_written.write", write)
    model = nn.Identity()
    assert written_until(model, 500, 4, 1, end=100).shape == (3 * 64, 4)
    assert seeds == [1, 2, 3]
    assert written_until(model, 100, 4, 1, end=1000).shape == (100, 4)
    assert written_until(model, 500, 4, 1, None).shape == (500, 4)
    assert written_until(model, 500, 4, 1, end=clock.time).shape == (0, 4)


# Whole calls


def small(**given: Any) -> tuple[nn.Module, Report]:
    torch.manual_seed(0)
    net = nn.Sequential(*(zoo.mlp(16, 24, 16) for _ in range(2)))
    how = {"method": "whitened", "policy": "uniform", "progress": False, "data": list(X.split(8))}
    return lowrank.compress(net, 0.5, **{**how, **given})


def ticking(clock: Clock, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Each gradient step of AdamW takes so long."""
    step = torch.optim.AdamW.step

    def slow(self: Any, *args: Any) -> Any:
        clock.time += seconds
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow)


TRAINS = Recovery(block_steps=10, distill_steps=20, rows=8)


@pytest.mark.parametrize(
    ("minutes", "steps"),
    [(400, [2 * 6, 38 - 12]), (1000, [2 * 16, 20])],
    ids=["fewer", "more, until distillation gains nothing"],
)
def test_a_call_takes_the_steps_that_it_has_time_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, minutes: float, steps: list[int]
) -> None:
    """At ten minutes a step; each of two blocks is given a sixth of the time."""
    ticking(clock, monkeypatch, 600.0)
    _, report = small(effort=TRAINS, minutes=minutes)
    gains = {gain.stage: gain for gain in report.gains}
    assert [gains["block refit"].steps, gains["distillation"].steps] == steps
    assert gains["block refit"].seconds == 600 * steps[0]
    assert gains["distillation"].seconds == 600 * steps[1]
    assert sum(600 * n for n in steps) == clock.time <= 60 * minutes
    assert report.plan.settings["recovery"]["minutes"] == minutes


def test_with_no_time_the_closed_form_runs_whole(clock: Clock) -> None:
    lean, report = small(effort=TRAINS, minutes=1e-9)
    same, closed = small(effort=Recovery(rows=8))
    for (name, tensor), other in zip(
        lean.state_dict().items(), same.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    said = "1e-09 minutes were too few for the closed form, which always runs whole"
    assert any(note.startswith(said) for note in report.notes)
    assert [g.stage for g in report.gains] == [g.stage for g in closed.gains] == ["refit by block"]
    assert report.gains[0].after == closed.gains[0].after


def test_every_stage_has_its_gain(clock: Clock) -> None:
    """What is between the stages is the judge's figure, and the notes' own."""
    torch.manual_seed(0)
    net = nn.Sequential(zoo.mlp(16, 24, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)).eval()
    _, report = lowrank.compress(
        net, 0.4, data=list(X.split(8)), method="whitened", policy="uniform", progress=False,
        effort=Recovery(block_steps=5, distill_steps=30, distill_rate=0.003, rows=8),
    )  # fmt: skip
    gains = report.gains
    whole = [gain for gain in gains if gain.measure == "KL"]
    assert [g.stage for g in whole] == ["refit by block", "batch norms", "distillation"]
    assert [g.after for g in whole[:-1]] == [g.before for g in whole[1:]]
    assert any(
        note == f"KL on held-out rows: {whole[0].before:.4g} -> {whole[-1].after:.4g}"
        for note in report.notes
    )
    assert whole[-1].steps == 30


def test_held_out_predictions_count_the_same_in_a_short_batch() -> None:
    """Six rows in batches of four: what distillation starts from is the KL over all of them."""
    torch.manual_seed(0)
    net = zoo.mlp(16, 24, 8)
    how = {"method": "whitened", "policy": "uniform", "progress": False, "copy": True}
    data = list(X.split(8))
    lean, closed = lowrank.compress(net, 0.4, data=data, effort=Recovery(rows=4), **how)
    assert not any("reverted" in note for note in closed.notes)
    trains = Recovery(rows=4, distill_steps=1)
    _, report = lowrank.compress(net, 0.4, data=data, effort=trains, **how)
    first, last = report.gains
    assert first.after == last.before == pytest.approx(lowrank.kl(lean, net, X[-6:]), rel=1e-4)


def test_a_killed_call_keeps_what_its_blocks_took(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ticking(clock, monkeypatch, 600.0)
    zoo.llama().save_pretrained(tmp_path / "dense")
    rows = zoo.tokens(24, 12)

    def call(name: str) -> Report:
        return lowrank.compress(
            str(tmp_path / "dense"), 0.6, out=tmp_path / name, data=rows, progress=False,
            method="whitened", policy="uniform",
            effort=Recovery(block_steps=10, distill_steps=10, minutes=300),
        )  # fmt: skip

    class Stopped(Exception):
        pass

    finished = Journal.finished

    def note(self: Journal, name: str, path: Path) -> None:
        finished(self, name, path)
        if name == "model.layers.0":
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finished", note)
        with pytest.raises(Stopped):
            call("killed")
    first = clock.time
    clock.time += 1e6
    went = {gain.stage: gain for gain in call("killed").gains}
    assert went["block refit"].seconds == 600 * went["block refit"].steps > first
    assert clock.time - 1e6 <= 300 * 60
    whole = {gain.stage: gain for gain in call("whole").gains}
    assert [went[name].steps for name in went] == [whole[name].steps for name in whole]


# Values


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, "20", True, [5]], ids=repr)
def test_a_time_that_is_none(bad: Any) -> None:
    for given in ({"effort": TRAINS, "minutes": bad}, {"minutes": bad}):
        with pytest.raises(LowrankError, match="minutes must be a number > 0, got"):
            small(**given)
    with pytest.raises(LowrankError, match="minutes must be a number > 0, got"):
        Recovery(block_steps=1, minutes=bad)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "minutes=5 is the time of an effort, and there is none: add effort='balanced'"),
        ({"effort": "fast"}, "is time for training, but without block_steps and distill_steps"),
        ({"effort": Recovery()}, "is time for training, but without block_steps"),
    ],
    ids=str,
)
def test_a_time_that_nothing_would_use(given: dict[str, Any], said: str) -> None:
    with pytest.raises(LowrankError) as caught:
        small(minutes=5, **given)
    assert said in str(caught.value)
