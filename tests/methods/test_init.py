"""The registry: names, near matches, objects."""

from __future__ import annotations

import re

import pytest

from lowrank.errors import LowrankError
from lowrank.methods import METHODS, SVD
from lowrank.methods.resolved import method_of


@pytest.mark.parametrize("name", METHODS)
def test_a_name_stands_for_a_method_with_the_seed(name: str) -> None:
    found = method_of(name, seed=7)
    assert isinstance(found, METHODS[name])
    assert found == METHODS[name](seed=7)
    assert found != METHODS[name](seed=8)
    assert hash(found) == hash(METHODS[name](seed=7))


def test_an_object_is_taken_as_it_is() -> None:
    mine = SVD(seed=3)
    assert method_of(mine, seed=7) is mine


def test_a_near_match_is_named() -> None:
    with pytest.raises(LowrankError, match=r"unknown method 'whiten'; did you mean 'whitened' or"):
        method_of("whiten")


@pytest.mark.parametrize("odd", [3, None, object(), {"curve": 1}])
def test_what_is_no_method_is_refused(odd: object) -> None:
    with pytest.raises(
        LowrankError,
        match=f"a method has kinds, needs, curve and factor .*{re.escape(repr(odd)[:9])}",
    ):
        method_of(odd)
