"""Run every notebook here from start to end; a failing cell fails the run. Nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    here = Path(__file__).parent
    for path in sorted(here.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": here}}
        )
        client.execute()
        print(f"executed {path.name}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    sys.exit(main())
