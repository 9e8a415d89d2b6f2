"""A function of a test file in several processes: `python -m tests.processes FILE NAME FOLDER`."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
LONGEST = 120  # seconds; processes that wait for each other fail, and do not block


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def in_processes(file: str, name: str, folder: Path, world: int = 2) -> list[Any]:
    """What the function returns in each process of a gloo group, by number."""
    command = [sys.executable, "-m", "tests.processes", file, name, str(folder)]
    started = [
        subprocess.Popen(
            command,
            env=environment(RANK=str(rank), WORLD_SIZE=str(world)),
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=LONGEST)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * world, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def main(file: str, name: str, folder: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=LONGEST),
    )
    result = getattr(importlib.import_module(file), name)()
    torch.save(result, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
