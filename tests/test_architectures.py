"""A tenth of the architectures, as docs/architectures.md says: `make architectures` runs all."""

from __future__ import annotations

import json

import pytest

from tests import architectures

ROWS = json.loads(architectures.RESULTS.read_text())


@pytest.mark.slow
def test_a_tenth_of_the_families_is_as_the_table_says() -> None:
    chosen = {row["name"]: row for row in ROWS[::10]}
    found = architectures.table(list(chosen))
    assert [row.name for row in found] == list(chosen)
    for row in found:
        assert row.cells == chosen[row.name]["cells"]
    assert architectures.faults(found) == []


def test_the_table_has_two_hundred_families_and_no_fault() -> None:
    rows = [architectures.Row(**row) for row in ROWS]
    assert len(rows) >= 200
    assert architectures.faults(rows) == []
    assert architectures.PAGE.read_text() == architectures.INTRODUCTION + architectures.page(rows)


def test_a_fault_is_no_reason() -> None:
    cells = {"data-free": "yes", "fast": "fault: RuntimeError", "bf16": "too few rows"}
    row = architectures.Row("one", "One", cells=cells)
    assert architectures.faults([row]) == ["one: fast: fault: RuntimeError"]
