"""report: a plan, or what came of it, as a page to look at."""

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
            help="What lowrank plan -o wrote; or the report.json, or the folder, of compress.",
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
            help="The page to write; beside the plan, ending in .html, if not given.",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Draw a plan or a report as one self-contained page: figures, and a table that can be sorted.

    \b
      lowrank report plan.json -o plan.html
      lowrank report out/report.json
    """  # fmt: skip
    from .. import page

    made = page.read(plan)
    place = out or (plan / "report.html" if plan.is_dir() else plan.with_suffix(".html"))
    if place.is_dir():
        raise LowrankError(f"{place} is a folder, expected the name of a file")
    if place.exists() and not force:
        raise LowrankError(f"{place} exists: choose another name, or add --force")
    page.write(made, place)
    say(f"wrote {place}: open it in a browser")


COMMANDS: dict[str, Callable[..., Any]] = {"report": report_command}
