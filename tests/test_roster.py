"""Every law that a row calls for × every registered method × every case × every dtype.

One test runs all laws of a method on one case; `python -m tests.roster` says how many that makes.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from lowrank.methods import JOINT, METHODS
from lowrank.testing import CASES, DTYPES, JOINT_CASES, check_method

from .roster import (
    DRAWN,
    JOINT_ROSTER,
    JOINT_ROWS,
    QUICK,
    ROSTER,
    ROWS,
    cases_of,
    combinations,
    hold,
    hold_joint,
)


def named(part: object) -> str:
    return str(part).removeprefix("torch.")


def test_every_registered_method_has_a_row() -> None:
    assert set(ROSTER) == set(METHODS)
    assert set(JOINT_ROSTER) == set(JOINT)


@pytest.mark.parametrize(("method", "case", "dtype"), ROWS, ids=named)
def test_all_laws(method: str, case: str, dtype: torch.dtype) -> None:
    hold(method, case, dtype)


@pytest.mark.parametrize(("method", "case", "dtype"), JOINT_ROWS, ids=named)
def test_all_joint_laws(method: str, case: str, dtype: torch.dtype) -> None:
    hold_joint(method, case, dtype)


def test_no_combination_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are run with laws that only write down that they were called."""
    ran: list[tuple[str, str, str]] = []

    def writing(kind: str, law: str) -> Any:
        return lambda method, case: ran.append((kind, law, case.name))

    for roster in (ROSTER, JOINT_ROSTER):
        for method, laws in list(roster.items()):
            monkeypatch.setitem(roster, method, {law: writing(method, law) for law in laws})
    for row in ROWS:
        hold(*row)
    for row in JOINT_ROWS:
        hold_joint(*row)
    every = {(m, law, c) for m, laws in ROSTER.items() for law, c in product(laws, cases_of(m))}
    every |= {
        (m, law, c) for m, laws in JOINT_ROSTER.items() for law, c in product(laws, JOINT_CASES)
    }
    crossed = {(m, law, f"{c}, {named(dtype)}") for (m, law, c), dtype in product(every, DTYPES)}
    assert len(ran) == len(set(ran)) == len(crossed) == combinations() >= 10_620
    assert set(ran) == crossed


def test_a_seed_changes_what_is_random_and_nothing_else() -> None:
    for name, method in METHODS.items():
        case, weights = CASES[cases_of(name)[0]](dtype=torch.float64), []
        for seed in (1, 2):
            option, new = next(case.built(method(seed=seed, **QUICK.get(name, {}))))
            weights.append(new.dense_weight())
        assert torch.equal(*weights) == (name not in DRAWN), f"{name}, {option}"


def test_check_method_runs_all_laws_in_one_call() -> None:
    check_method(METHODS["svd"](), dtypes=[torch.float64])


# One skipped line says as much as a thousand.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("method", "case", "dtype"), ROWS if torch.cuda.is_available() else ROWS[:1], ids=named
)
def test_all_laws_on_a_gpu(method: str, case: str, dtype: torch.dtype) -> None:
    hold(method, case, dtype, device="cuda")
