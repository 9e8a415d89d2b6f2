"""Files damaged at random: tests/fuzz.py, a few hundred times."""

from __future__ import annotations

import pytest

from tests.fuzz import fuzz


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_one_error_or_a_working_model() -> None:
    told, faults = fuzz(seed=3, count=300)
    assert faults == []
    assert told["refused"] > 200
    assert told["accepted"] > 5
