"""Run notebooks from start to end; a failing cell fails the run. Nothing is written.

python notebooks/execute.py [NAME …]     those whose names begin so; all by default
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(names: list[str]) -> None:
    here = Path(__file__).parent
    for path in sorted(here.glob("*.ipynb")):
        if names and not path.name.startswith(tuple(names)):
            continue
        notebook, started = nbformat.read(path, as_version=4), time.perf_counter()
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": here}}
        )
        client.execute()
        pictures = sum(
            "image/png" in output.get("data", {})
            for cell in notebook.cells
            for output in cell.get("outputs", [])
        )
        if not pictures:
            raise SystemExit(f"{path.name} has no picture: every notebook here shows one")
        seconds = time.perf_counter() - started
        done = f"{len(notebook.cells)} cells, {pictures} pictures, {seconds:.0f} s"
        print(f"executed {path.name}: {done}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
