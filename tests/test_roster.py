"""Every law that a row calls for × every registered method × every case × every dtype."""

from __future__ import annotations

import pytest
import torch

from lowrank.methods import JOINT, METHODS
from lowrank.testing import CASES, DTYPES, JOINT_CASES, check_method

from .roster import JOINT_ROSTER, QUICK, ROSTER

ROWS = [(method, law) for method, laws in ROSTER.items() for law in laws]
KIND = {name: make(dtype=torch.float64).site.kind for name, make in CASES.items()}


def kinds(method: str) -> list[str]:
    """The cases of the kinds that a method takes."""
    return [case for case, kind in KIND.items() if kind in METHODS[method]().kinds]


CROSSED = [(method, law, case) for method, law in ROWS for case in kinds(method)]


def test_every_registered_method_has_a_row() -> None:
    assert set(ROSTER) == set(METHODS)
    assert set(JOINT_ROSTER) == set(JOINT)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("method", "law", "case"), CROSSED, ids=["-".join(row) for row in CROSSED])
def test_law(method: str, law: str, case: str, dtype: torch.dtype) -> None:
    way = METHODS[method](**QUICK.get(method, {}))
    ROSTER[method][law](way, CASES[case](dtype=dtype))


@pytest.mark.parametrize("case", JOINT_CASES)
@pytest.mark.parametrize(
    ("method", "law"), [(method, law) for method, laws in JOINT_ROSTER.items() for law in laws]
)
def test_joint_law(method: str, law: str, case: str) -> None:
    for dtype in DTYPES:
        JOINT_ROSTER[method][law](JOINT[method](), JOINT_CASES[case](dtype=dtype))


def test_a_seed_changes_what_is_random_and_nothing_else() -> None:
    for name, method in METHODS.items():
        case, found = CASES[kinds(name)[0]](dtype=torch.float64), []
        for seed in (1, 2):
            option, new = next(case.built(method(seed=seed)))
            found.append(new.dense_weight())
        reproduces = "planted" in ROSTER[name]
        assert torch.equal(*found) == reproduces, f"{name}, {option}"


def test_check_method_runs_all_laws_in_one_call() -> None:
    check_method(METHODS["svd"](), dtypes=[torch.float64])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("method", "law"), ROWS, ids=["-".join(row) for row in ROWS])
def test_law_on_a_gpu(method: str, law: str) -> None:
    for case in kinds(method):
        for dtype in DTYPES:
            way = METHODS[method](**QUICK.get(method, {}))
            ROSTER[method][law](way, CASES[case](dtype=dtype, device="cuda"))
