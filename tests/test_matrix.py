"""Some cells of docs/matrix.md, as it says they are: `make matrix` runs all."""

from __future__ import annotations

import json

import pytest

from tests import matrix
from tests.tools import TOOLS

ROWS = json.loads(matrix.RESULTS.read_text())
HELD = [row for row in ROWS if isinstance(row["cells"], dict)]
APART = ("int8", "ONNX")  # tests/seams has them; they take long


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(3, len(HELD), 13))
def test_some_cells_are_as_the_page_says(number: int) -> None:
    row, quick = HELD[number], [tool for tool in TOOLS if tool not in APART]
    chosen = [quick[(number + step) % len(quick)] for step in (0, 4)]
    found = matrix.row_of(row["architecture"], row["form"], chosen)
    assert found == {tool: row["cells"][tool] for tool in chosen}


def test_the_page_is_of_the_results_and_holds_no_fault() -> None:
    assert matrix.faults(ROWS) == []
    assert {row["architecture"] for row in HELD} == set(matrix.ARCHITECTURES)
    assert {row["form"] for row in HELD} == set(matrix.FORMS)
    assert all(set(row["cells"]) == set(matrix.COLUMNS) for row in HELD)
    assert matrix.PAGE.read_text() == matrix.INTRODUCTION + matrix.page(ROWS)


def test_a_fault_is_no_reason() -> None:
    cells = {"bf16": "yes", "compile": "fault: RuntimeError: no", "LoRA, merge": "no layers"}
    row = {"architecture": "One", "form": "plain", "cells": cells}
    assert matrix.faults([row]) == ["One, plain: compile: fault: RuntimeError: no"]
    none = {"architecture": "One", "form": "Tucker", "cells": "no target is one"}
    text = matrix.page([row, none])
    assert "Tucker" not in text
    assert "2. no layers" in text
