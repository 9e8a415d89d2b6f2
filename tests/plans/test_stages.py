"""Stages of a call: their names, and what they add up to."""

from __future__ import annotations

import json
import logging
import mmap
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank
from lowrank import Recovery, Report
from lowrank.plans import stages
from lowrank.plans.stages import anonymous_bytes, recorded, recording, stage
from tests.zoo import make, mlp, tokens

MIB = 1 << 20
FAST = [
    "calibration", "gradients", "decompositions", "choosing ranks", "factoring", "refit by block",
    "judging", "measuring errors",
]  # fmt: skip


def within(report: Report) -> bool:
    """Whether every stage is possible, and none counts twice."""
    possible = all(one.seconds >= 0 and one.peak_bytes > 0 for one in report.stages)
    return possible and 0 < sum(one.seconds for one in report.stages) <= report.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one number, which the test sets."""
    now = [0.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])
    return now


def test_an_effort_is_recorded_stage_by_stage() -> None:
    _, report = lowrank.compress(
        make("llama"), 0.6, data=tokens(24, 16), effort="fast", progress=False
    )
    assert [one.name for one in report.stages] == FAST
    assert within(report)


def test_only_what_is_done_is_a_stage() -> None:
    _, report = lowrank.compress(mlp(24, 16), 0.5)
    assert [one.name for one in report.stages] == ["decompositions", "choosing ranks", "factoring"]
    recovery = Recovery(distill_steps=1)
    model, data = make("llama"), tokens(24, 16)
    plan = lowrank.plan(
        model, 0.6, data=data, method="svd", policy="uniform", effort=recovery, progress=False
    )
    _, report = lowrank.apply(model, plan, data=data, progress=False)
    assert [one.name for one in report.stages] == [
        "calibration", "factoring", "refit by block", "distillation", "judging", "measuring errors",
    ]  # fmt: skip
    assert within(report)


def test_batch_norms_are_a_stage() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 5),
    ).eval()  # fmt: skip
    data = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    _, report = lowrank.compress(net, 0.7, data=data, effort="fast", progress=False)
    assert "batch norms" in [one.name for one in report.stages]


def test_from_folder_to_folder_loading_and_writing_count(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    report = lowrank.compress(str(tmp_path / "dense"), 0.6, data=None, out=out)
    names = [one.name for one in report.stages]
    assert names == ["loading", "decompositions", "choosing ranks", "factoring", "writing"]
    assert within(report)
    assert Report.from_json((out / "report.json").read_text()) == report


def test_a_stage_inside_another_is_part_of_it(clock: list[float]) -> None:
    with recording():
        clock[0] = 1
        with stage("outer"):
            clock[0] = 3
            with stage("inner"):
                clock[0] = 7
            clock[0] = 8
        clock[0] = 10
        with stage("last"):
            clock[0] = 12
        with stage("outer"):
            clock[0] = 15
        found, seconds = recorded() or ((), 0.0)
    assert [(one.name, one.seconds) for one in found] == [("outer", 10), ("last", 2)]
    assert seconds == 15


def test_the_end_of_a_stage_is_logged(clock: list[float], caplog: Any) -> None:
    caplog.set_level(logging.INFO, "lowrank")
    for seconds in (1.5, 2.0):  # entered again, it says how long this time took
        with recording(), stage("one"):
            with stage("inner"):
                clock[0] += seconds
            assert len(caplog.records) == (seconds == 2.0)
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(", memory ")[0] for text in said] == ["one: 1.5 s", "one: 2.0 s"]
    assert all(int(text.split()[-2]) > 0 for text in said)


def test_a_recording_inside_another_is_part_of_it(clock: list[float]) -> None:
    with recording():
        with stage("first"), recording():
            clock[0] = 2
        with recording(), stage("second"):
            clock[0] = 5
        found, seconds = recorded() or ((), 0.0)
    assert [(one.name, one.seconds) for one in found] == [("first", 2), ("second", 3)]
    assert seconds == 5
    assert recorded() is None


def test_an_error_ends_stage_and_recording(clock: list[float]) -> None:
    before = threading.active_count()

    def fail() -> None:
        with stage("fails"):
            clock[0] = 2
            raise ValueError("oops")

    with recording():
        with pytest.raises(ValueError, match="oops"):
            fail()
        with stage("next"):
            clock[0] = 3
        found, _ = recorded() or ((), 0.0)
    assert [(one.name, one.seconds) for one in found] == [("fails", 2), ("next", 1)]
    with pytest.raises(ValueError, match="oops"), recording():
        raise ValueError("oops")
    assert recorded() is None
    assert threading.active_count() == before


def test_the_peak_is_seen_between_start_and_end() -> None:
    with recording():
        with stage("small"):
            pass
        with stage("large"):
            block = bytearray(b"x" * (64 * MIB))
            time.sleep(10 * stages.INTERVAL)
            del block
        with stage("after"):
            pass
        (small, large, after), _ = recorded() or ((), 0.0)
    assert large.peak_bytes > small.peak_bytes + 48 * MIB
    assert large.peak_bytes > after.peak_bytes + 48 * MIB


def test_memory_in_files_does_not_count(tmp_path: Path) -> None:
    if not stages._STATM.is_file():
        pytest.skip("no /proc")
    status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
    assert abs(anonymous_bytes() - 1024 * int(status.split()[0])) < 4 * MIB
    before = anonymous_bytes()
    size = 64 * MIB
    (tmp_path / "file").write_bytes(bytes(size))
    mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=size, dtype=torch.uint8)
    mapped.fill_(1)
    assert anonymous_bytes() - before < 16 * MIB
    # Not from the heap, which may hold as much from earlier tests.
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own:
        own.write(bytes(size))
        assert anonymous_bytes() - before > 48 * MIB
    assert mapped.numel() == size


def test_without_proc_what_was_resident_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resident = anonymous_bytes()
    monkeypatch.setattr(stages, "_STATM", tmp_path / "absent")
    assert anonymous_bytes() >= resident > MIB


def test_stages_are_printed_saved_and_checked() -> None:
    _, report = lowrank.compress(mlp(24, 16), 0.5)
    assert [row["stage"] for row in report.times()] == [one.name for one in report.stages]
    assert all(set(row) == {"stage", "seconds", "peak memory"} for row in report.times())
    body = json.loads(report.to_json())
    assert [one["name"] for one in body["stages"]] == [one.name for one in report.stages]
    older = {key: value for key, value in body.items() if key != "stages"}
    assert Report.from_json(json.dumps(older)).stages == ()
    for first, second in pairwise(report.stages):
        assert first.name != second.name
    for wrong in ([3], [{"name": "a"}], [{"name": "a", "seconds": -1, "peak_bytes": 1}], 3):
        with pytest.raises(lowrank.LowrankError, match="stage"):
            Report.from_json(json.dumps({**body, "stages": wrong}))
