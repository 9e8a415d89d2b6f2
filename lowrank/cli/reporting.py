"""report: a plan or a compression report as an HTML page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LowrankError
from .console import say
from .inputs import Force


def report_command(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Plan saved by lowrank plan, or report.json or output folder of compress.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            show_default=False,
            help="Page to write; by default next to FILE, ending in .html.",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Draw a plan or report as a self-contained HTML page.

    \b
      lowrank report plan.json -o plan.html
      lowrank report out/report.json
    """  # fmt: skip
    from .. import page

    document = page.read(plan)
    path = out or (plan / "report.html" if plan.is_dir() else plan.with_suffix(".html"))
    if path.is_dir():
        raise LowrankError(f"{path} is a folder, expected a file name")
    if path.exists() and not force:
        raise LowrankError(f"{path} exists: choose another name, or add --force")
    page.write(document, path)
    say(f"wrote {path}: open it in a browser")


COMMANDS: dict[str, Callable[..., Any]] = {"report": report_command}
