"""Output of the commands: lines, tables and errors; and silencing of other libraries."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import typer

from .launched import number, writes

WIDTH = 100  # columns, if the output is not a terminal
NAMES = ("site", "note", "shape", "method", "policy", "path", "per forward pass")  # never wrapped
TEXTS = ("what it does", "needs")


def say(line: str = "") -> None:
    """Print one line on stdout, never wrapped; of several processes, the first does."""
    if writes():
        typer.echo(line)


@contextmanager
def logged(verbose: bool) -> Iterator[None]:
    """Meanwhile what the library logs is printed on stderr, if that is asked for."""
    logger, handler = logging.getLogger("lowrank"), logging.StreamHandler(sys.stderr)
    before = logger.level
    if verbose:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def complain(line: str) -> None:
    """Print an error as one line on stderr; processes after the first say which they are."""
    who = "lowrank" if writes() else f"lowrank, process {number()}"
    typer.secho(f"{who}: ", err=True, fg="red", nl=False)
    typer.echo(line, err=True)


def show(renderable: Any) -> None:
    """Print a rich renderable; rather too wide than with numbers cut off.

    Of several processes, the first prints it.
    """
    if not writes():
        return
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    unbounded = console.options.update_width(sys.maxsize)
    console.width = max(console.width, Measurement.get(console, unbounded, renderable).minimum)
    console.print(renderable)


def table_of(rows: Sequence[Mapping[str, str]]) -> Any:
    """A rich table: words aligned left, numbers right, empty columns left out."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    columns = [c for c in rows[0] if any(row[c] for row in rows)] if rows else []
    for column in columns:
        text = column in TEXTS  # only these may wrap
        least = None if text else max(len(column), *(len(row[column]) for row in rows))
        side: Literal["left", "right"] = "left" if text or column in NAMES else "right"
        table.add_column(column, justify=side, min_width=least, no_wrap=not text)
    for row in rows:
        table.add_row(*(row[c] for c in columns))
    return table


def say_reasons(label: str, reasons: Iterable[tuple[str, str]]) -> None:
    """Print one line per reason, with the first layer and the number of others."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        if reason:
            names.setdefault(reason, []).append(name)
    for reason, layers in names.items():
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        say(f"{label}: {layers[0]}{more}: {reason}")


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def on_terminal() -> bool:
    """Whether stderr is a terminal, so that progress bars are useful; of one process alone."""
    return writes() and sys.stderr.isatty()


@contextmanager
def hushed() -> Iterator[None]:
    """Silence progress bars and warnings of transformers and the hub; restores their settings.

    Downloads still show progress on a terminal. The caller checks what a load report would say.
    """
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging as chatter

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level, hub_bars = hub.level, not are_progress_bars_disabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    if hub_bars and not on_terminal():
        disable_progress_bars()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            chatter.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
