"""A call from folder to folder that is killed goes on, and ends in the same bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.recover.journal import Journal
from tests import zoo

# Kills itself right after the given piece is finished; "writing" is before the result is in place.
CALL = """
import os, signal, sys
from pathlib import Path
import torch, lowrank
from lowrank.api import from_disk
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


def left(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


@pytest.mark.parametrize("effort", ["fast", "blocks"])
def test_a_call_that_is_killed_ends_in_the_same_bytes(
    source: Path, tmp_path: Path, effort: str
) -> None:
    assert run(source, tmp_path / "whole" / "out", effort=effort) == 0
    out = tmp_path / "killed" / "out"
    for last in ("calibration", "plan", "model.layers.1", "writing"):
        assert run(source, out, last, effort) == -9
        assert not out.exists()
        assert ".out.unfinished" in left(out)
    done = Journal.read(out.parent / ".out.unfinished").pieces
    assert [*done] == ["calibration", "plan", *(f"model.layers.{i}" for i in range(3))]
    assert run(source, out, effort=effort) == 0
    assert digests(out) == digests(tmp_path / "whole" / "out")
    assert left(out) == []
    whole, killed = (
        json.loads((folder / "report.json").read_text())
        for folder in (tmp_path / "whole" / "out", out)
    )
    assert killed["notes"] == whole["notes"]
    assert killed["plan"] == whole["plan"]
