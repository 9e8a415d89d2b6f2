"""What every result carries: machine, versions, commit, seed."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def provenance(seed: int = 0) -> dict[str, Any]:
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": _commit(),
        "seed": seed,
    }


def keep(name: str, rows: Any, seed: int = 0, **more: Any) -> None:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    body = {"provenance": provenance(seed), **more, "rows": rows}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(f"written: benchmarks/results/{path.name}")


def figure(
    kind: str, name: str, model: str, setting: str, share: float, measure: str, value: float,
    seconds: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A row of the list `gallery`, as website/figures.py reads it; `share` is what is kept."""
    return {
        "kind": kind, "name": name, "model": model, "setting": setting, "keep": share,
        "measure": measure, "value": value, "seconds": seconds,
    }  # fmt: skip


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
