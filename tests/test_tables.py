"""Tables in three dresses: text, rich, Markdown."""

from __future__ import annotations

import io

from lowrank.tables import aligned, markdown, rich_table

ROWS = [
    {"site": "a.long.name", "rank": "8", "reason": ""},
    {"site": "b", "rank": "128", "reason": ""},
]


def rendered(table: object) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_columns_stand_under_each_other_and_empty_ones_are_left_out() -> None:
    assert aligned(ROWS) == ["site         rank", "a.long.name  8", "b            128"]
    assert aligned([]) == []


def test_markdown() -> None:
    rows = [{"site": "a", "reason": "x|y"}]
    assert markdown(rows) == "| site | reason |\n| --- | --- |\n| a | x\\|y |"
    assert markdown([]) == ""


def test_rich_shows_all_and_reads_nothing_as_markup() -> None:
    rows = [{"site": "[bold]a", "rank": "8", "reason": "rank must be in [red]"}]
    text = rendered(rich_table("asked {'[a-z]_proj': 8} [/x]", rows))
    for words in ("asked {'[a-z]_proj': 8} [/x]", "[bold]a", "in [red]", "rank"):
        assert words in text


def test_rich_columns_of_numbers_stand_right() -> None:
    lines = rendered(rich_table("title", ROWS)).splitlines()
    eight, many = (next(line for line in lines if name in line) for name in ("a.long", " b "))
    assert eight.index("8") == many.index("128") + 2
