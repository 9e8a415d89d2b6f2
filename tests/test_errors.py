"""Messages that people read: near matches are named, long lists are cut."""

from __future__ import annotations

from lowrank.errors import LowrankError, listed, unknown


def test_it_is_a_value_error() -> None:
    assert issubclass(LowrankError, ValueError)


def test_near_matches_and_all_known_names_are_said() -> None:
    said = str(unknown("method", "withened", {"svd": 1, "whitened": 2}))
    assert said == "unknown method 'withened'; did you mean 'whitened'? (known: svd, whitened)"


def test_two_near_matches() -> None:
    said = str(unknown("policy", "unifrom", ["uniform", "uniforms", "energy"]))
    assert "did you mean 'uniform' or 'uniforms'?" in said


def test_many_names_are_cut() -> None:
    said = str(unknown("form", "!", [f"SomeLongNameOfAForm{n}" for n in range(50)]))
    assert said.endswith(" … (+26 more))")


def test_nothing_near() -> None:
    said = str(unknown("unit", "furlongs", ["params", "bytes"]))
    assert said == "unknown unit 'furlongs' (known: bytes, params)"


def test_long_lists_are_cut() -> None:
    assert listed([]) == ""
    assert listed("ab") == "a, b"
    assert listed((str(n) for n in range(5)), most=3) == "0, 1, 2 … (+2 more)"
    assert listed((str(n) for n in range(3)), most=3) == "0, 1, 2"
