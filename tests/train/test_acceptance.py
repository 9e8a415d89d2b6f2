"""Sixteen laws of training with ranks that change, and the tests that hold them.

T1   bases that grow change nothing
T2   a truncation loses its tail, and no more than the tolerance
T3   planted ranks are found
T4   training with drawn widths ends at the SVD, for every width
T5   the condition number is bounded after every step
T6   bases stay orthonormal over a thousand steps in fp32
T7   at full rank a factored convolution is the convolution
T8   HOOI ≤ HOSVD ≤ the bound by the tails
T9   moments come back from a basis that grew and shrank
T10  the optimizer holds exactly the live parameters
T11  a checkpoint at changed ranks comes back bit for bit
T12  a resumed run is the unbroken one
T13  EVBMF finds planted ranks, either way round
T14  the gradient of Frobenius decay is that of autograd
T15  projected gradients of full rank are plain ones, in a rotated basis
T16  Vᵀ taken for V is noticed
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LAWS = {
    "T1": {"train/test_dlrt.py", "train/test_tucker.py"},
    "T2": {"linalg/test_retract.py", "train/test_dlrt.py", "train/test_tucker.py"},
    "T3": {"train/test_dlrt.py", "train/test_tucker.py"},
    "T4": {"train/test_maestro.py"},
    "T5": {"train/test_condlr.py"},
    "T6": {"linalg/test_retract.py", "train/parts/test_usv.py"},
    "T7": {"nn/test_factored_conv.py", "train/parts/test_tucker_form.py"},
    "T8": {"linalg/test_modes.py", "linalg/test_tucker.py"},
    "T9": {"train/parts/test_optimizer.py"},
    "T10": {"train/test_dlrt.py", "train/parts/test_optimizer.py", "train/test_tucker.py"},
    "T11": {"train/test_resume.py"},
    "T12": {"train/test_resume.py", "train/test_tucker.py"},
    "T13": {"linalg/test_evbmf.py"},
    "T14": {"train/test_frobenius.py"},
    "T15": {"train/test_loqt.py"},
    "T16": {"train/test_dlrt.py"},
}


def named(path: Path) -> Iterator[str]:
    """The laws that docstrings of tests in this file begin with: "T10, T12: …"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield from re.findall(r"T\d+", (ast.get_docstring(node) or "").split(":")[0])


@pytest.mark.parametrize("law", LAWS)
def test_every_law_has_its_tests(law: str) -> None:
    for file in LAWS[law]:
        assert law in set(named(TESTS / file)), f"no test in {file} says that it holds {law}"


def test_the_list_is_whole() -> None:
    assert re.findall(r"^T\d+", __doc__, re.MULTILINE) == list(LAWS)
    paths = [
        path for folder in ("linalg", "nn", "train") for path in (TESTS / folder).rglob("*.py")
    ]
    claimed = {(law, path.relative_to(TESTS).as_posix()) for path in paths for law in named(path)}
    assert claimed == {(law, file) for law, files in LAWS.items() for file in files}
