"""Rows of text as an aligned block, as a rich table, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, str]]
NUMBERS = ("rank", "kept", "error", "measured")


def aligned(rows: Rows) -> list[str]:
    """Lines with aligned columns; empty columns are omitted."""
    columns = _filled(rows)
    width = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    lines = ["  ".join(c.ljust(width[c]) for c in columns)] if columns else []
    lines += ["  ".join(row[c].ljust(width[c]) for c in columns) for row in rows]
    return [line.rstrip() for line in lines]


def rich_table(title: str, rows: Rows) -> Any:
    """A rich.table.Table, with markup disabled."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="table.title"), title_justify="left")
    for column in _filled(rows):
        table.add_column(
            column,
            justify="right" if column in NUMBERS else "left",
            no_wrap=column == "site",
        )
    for row in rows:
        table.add_row(*(Text(row[c]) for c in _filled(rows)))
    return table


def markdown(rows: Rows) -> str:
    """A Markdown table, pipes escaped; "" without rows."""
    columns = _filled(rows)
    if not columns:
        return ""
    body = [[row[c].replace("|", r"\|") for c in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _filled(rows: Rows) -> list[str]:
    """Columns that are not empty."""
    return [c for c in rows[0] if any(row[c] for row in rows)] if rows else []
