"""Commands that a launcher starts in several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowrank
from lowrank.cli import launched
from lowrank.errors import LowrankError
from tests.processes import LONGEST, ROOT, environment

from .helpers import run


def torchrun(*args: object) -> subprocess.CompletedProcess[str]:
    """`lowrank` with these arguments in two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "lowrank", *map(str, args)]
    return subprocess.run(
        command,
        env=environment(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=LONGEST,
        cwd=ROOT,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_write_one_folder(made: SimpleNamespace, tmp_path: Path) -> None:
    options = ["--ratio", 0.6, "--effort", "fast", "--data", made.text, "--length", 32]
    done = torchrun("compress", made.dense, *options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    run("compress", made.dense, *options, "--out", tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    one, two = (lowrank.from_pretrained(str(tmp_path / name)) for name in ("one", "two"))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(two(ids).logits, one(ids).logits, rtol=1e-5, atol=1e-5)
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_an_error_ends_both(made: SimpleNamespace, tmp_path: Path) -> None:
    done = torchrun("compress", made.dense, "--ratio", 2, "--out", tmp_path / "out")
    assert done.returncode != 0
    assert "lowrank: ratio is the fraction kept" in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_commands_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched.check_shared("merge")
    monkeypatch.setenv("WORLD_SIZE", "2")
    launched.check_shared("merge")  # no launcher without a rank
    monkeypatch.setenv("RANK", "1")
    launched.check_shared("compress")
    with pytest.raises(LowrankError, match="merge runs in one process, got WORLD_SIZE=2"):
        launched.check_shared("merge")


def test_the_first_process_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowrank.cli.console import complain, on_terminal, say, show

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, who in (("0", "lowrank"), ("1", "lowrank, process 1")):
        monkeypatch.setenv("RANK", rank)
        say("a line")
        show("a table")
        complain("wrong")
        printed = capsys.readouterr()
        assert printed.err == f"{who}: wrong\n"
        assert printed.out == ("a line\na table\n" if rank == "0" else "")
    assert not on_terminal()


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        place = "cpu"

        def to(self, place: str) -> Model:
            self.place = place
            return self

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launched.placed(Model()).place == "cpu"  # alone: as it was loaded
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched.placed(Model()).place == "cpu"  # four processes, and two GPUs
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched.placed(Model()).place == "cuda:1"
