"""A call from folder to folder that is killed goes on, and ends in the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank
from lowrank import LowrankError
from lowrank.api import deciding, from_disk
from lowrank.linalg import mapped
from lowrank.recover.journal import Journal
from tests import zoo

# Kills itself right after the given piece is finished, or before the result takes its place.
CALL = """
import os, signal, sys
from pathlib import Path
import torch, lowrank
from lowrank.recover.journal import Journal

torch.set_num_threads(1)
source, out, last, effort = sys.argv[1:]
finished = Journal.finished

def note(self, name, path):
    finished(self, name, path)
    if name == last:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.finished = note
if last == "writing":
    Path.chmod = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
rows = torch.randint(0, 30, (48, 16), generator=torch.Generator().manual_seed(0))
effort = lowrank.Recovery(block_steps=2) if effort == "blocks" else effort
lowrank.compress(source, 0.6, out=out, data=rows, effort=effort, progress=False)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dense"
    zoo.llama(num_hidden_layers=3).save_pretrained(folder)
    return folder


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 30, (48, 16), generator=torch.Generator().manual_seed(seed))


def run(source: Path, out: Path, last: str = "", effort: str = "fast") -> int:
    call = [sys.executable, "-c", CALL, str(source), str(out), last, effort]
    return subprocess.run(call, capture_output=True, timeout=300, check=False).returncode


def digests(folder: Path) -> dict[str, str]:
    """Of all files whose bytes do not depend on time."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".json") and path.name != "report.json"
    }


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


@pytest.mark.parametrize("effort", ["fast", "blocks"])
def test_a_call_that_is_killed_ends_in_the_same_bytes(
    source: Path, tmp_path: Path, effort: str
) -> None:
    whole, out = tmp_path / "whole" / "out", tmp_path / "killed" / "out"
    assert run(source, whole, effort=effort) == 0
    for last in ("calibration", "plan", "model.layers.1", "writing"):
        assert run(source, out, last, effort) == -9
        assert not out.exists()
        assert beside(out) == [".out.unfinished"]
    done = Journal.read(out.parent / ".out.unfinished").pieces
    assert [*done] == ["calibration", "plan", *(f"model.layers.{i}" for i in range(3))]
    assert run(source, out, effort=effort) == 0
    assert digests(out) == digests(whole)
    assert "model.safetensors" in digests(out)
    assert beside(out) == []
    first, second = (json.loads((one / "report.json").read_text()) for one in (whole, out))
    for name in ("notes", "plan", "achieved", "sites"):
        kept = [dict(row, seconds=0) for row in second[name]] if name == "sites" else second[name]
        assert kept == (
            [dict(row, seconds=0) for row in first[name]] if name == "sites" else first[name]
        )


class Stopped(Exception):
    """Stands for a kill: no clean-up of ours knows it."""


def stopped(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, **changes: Any) -> None:
    """Stop a call once its plan is finished."""
    finished = Journal.finished

    def note(self: Journal, name: str, path: Path) -> None:
        finished(self, name, path)
        if name == "plan":
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finished", note)
        with pytest.raises(Stopped):
            call(source, out, **changes)


def call(source: Path, out: Path, **changes: Any) -> Any:
    given = {"ratio": 0.6, "data": rows(), "effort": "fast", **changes}
    return lowrank.compress(str(source), given.pop("ratio"), out=out, progress=False, **given)


def count(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Counts the calls of a function of deciding.py."""
    calls: list[int] = []
    before = getattr(deciding, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return before(*args, **kwargs)

    monkeypatch.setattr(deciding, name, counted)
    return calls


def test_what_is_finished_is_not_done_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(monkeypatch, source, out)
    made = [count(monkeypatch, name) for name in ("calibrate", "with_fisher", "make_plan")]
    call(source, out)
    assert made == [[], [], []]
    assert beside(out) == []


def test_a_generator_goes_on_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, source, tmp_path / "out", data=iter(rows().split(8)))
    made = count(monkeypatch, "calibrate")
    call(source, tmp_path / "out", data=iter(rows().split(8)))
    assert made == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 0.7}, r"unfinished work of another call \(ratio=0.6, not 0.7\)"),
        ({"effort": "balanced"}, r"another call \(effort='fast', not 'balanced'\)"),
        ({"effort": "balanced", "minutes": 5}, r"not 'balanced', minutes=None, not 5\)"),
        ({"exclude_modules": "q_proj"}, r"\(exclude_modules=None, not 'q_proj'\)"),
        ({"data": rows(1)}, "unfinished work on other data: pass the same rows"),
        ({"data": "self"}, "unfinished work on other data: pass the same rows"),
        ({"data": lambda model: model(rows())}, "unfinished work on other data"),
    ],
)
def test_a_changed_call_is_refused_and_loses_nothing(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
) -> None:
    out = tmp_path / "out"
    stopped(monkeypatch, source, out)
    with pytest.raises(LowrankError, match=said):
        call(source, out, **changes)
    made = count(monkeypatch, "calibrate")
    call(source, out)
    assert made == []


def test_another_model_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(monkeypatch, source, tmp_path / "out")
    other = zoo.llama(num_hidden_layers=3)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LowrankError, match=r"of another call \(another model\)"):
        call(tmp_path / "other", tmp_path / "out")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fcntl")
def test_a_second_process_is_refused(source: Path, tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / ".out.unfinished"
    folder.mkdir()
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LowrankError, match="another process is at work in"):
            call(source, tmp_path / "out")
    call(source, tmp_path / "out")


def damaged(folder: Path) -> Path:
    next(folder.glob("block-*.safetensors")).write_bytes(b"\0" * 100)
    return folder


def without_line(folder: Path) -> Path:
    text = (folder / "journal.jsonl").read_text()
    (folder / "journal.jsonl").write_text(text[:-20])
    return folder


@pytest.mark.parametrize("harm", [damaged, without_line])
def test_a_damaged_piece_is_done_again(
    source: Path, tmp_path: Path, harm: Callable[[Path], Path]
) -> None:
    assert run(source, tmp_path / "whole" / "out") == 0
    out = tmp_path / "harmed" / "out"
    assert run(source, out, "model.layers.1") == -9
    harm(out.parent / ".out.unfinished")
    assert run(source, out) == 0
    assert digests(out) == digests(tmp_path / "whole" / "out")


def test_a_full_disk_keeps_what_is_finished_and_the_older_result(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    call(source, out, effort=None, method="whitened")
    older = digests(out)
    stopped(monkeypatch, source, out)

    def full(_descriptor: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(mapped, "_allocate", full)
        patch.setattr(mapped, "SMALL", 16)
        with pytest.raises(
            LowrankError, match=r"No space left on device; what is finished stays in .*unfinished"
        ):
            call(source, out)
    assert digests(out) == older
    made = count(monkeypatch, "calibrate")
    call(source, out)
    assert made == []
    assert digests(out) != older


def test_an_error_in_the_arguments_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match="matches none of"):
        call(source, tmp_path / "out", target_modules="absent")
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_ratio_may_be_corrected(source: Path, tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match="ask for at least that"):
        call(source, tmp_path / "out", ratio=0.01)
    call(source, tmp_path / "out")


def test_places_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LowrankError, match="cannot be written"):
        call(source, tmp_path / "file" / "out")
    with pytest.raises(LowrankError, match="is a file, expected a folder"):
        call(source, tmp_path / "file")
    with pytest.raises(LowrankError, match="is the model's own folder"):
        call(source, source)
    assert (tmp_path / "file").read_text() == "mine"
    assert beside(source) == []


def test_a_callable_runs_without_a_journal(source: Path, tmp_path: Path) -> None:
    report = lowrank.compress(
        str(source), 0.6, out=tmp_path / "out", data=lambda model: model(rows()),
        method="whitened", progress=False,
    )  # fmt: skip
    assert report.achieved <= 0.6
    assert beside(tmp_path / "out") == []


def test_an_older_result_comes_back_after_a_kill_between_the_moves(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    call(source, out)
    (out / "notes.txt").write_text("mine")
    before = digests(out)
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if target == out:
            raise Stopped
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(from_disk, "bring_back", lambda *_: None)  # a killed process does not
        with pytest.raises(Stopped):
            call(source, out, ratio=0.7)
    assert not out.exists()
    with pytest.raises(LowrankError, match="work of another call"):
        call(source, out)
    assert digests(out) == before
    call(source, out, ratio=0.7)
    assert digests(out) != before
    assert (out / "notes.txt").read_text() == "mine"
    assert beside(out) == []
