"""The generator gives published words, the same ones in whatever order they are asked for."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank.linalg import counter


def test_words_are_those_of_splitmix64() -> None:
    """Of the key 1234567, as other implementations print them."""
    found = counter.splitmix(np.array([1234567], dtype=np.uint64), 0, 5)[0].tolist()
    assert found == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip


def by_hand(key: int, place: int) -> int:
    """In Python's own integers."""
    z = (key + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_a_word_depends_on_seed_stream_and_place_alone() -> None:
    keys = counter.keys_of(7, 3, 4)
    whole = counter.splitmix(keys, 0, 10)
    assert (counter.splitmix(keys[2:3], 6, 3) == whole[2:3, 6:9]).all()
    assert (counter.words(7, 5, 10) == whole[2]).all()
    assert int(whole[2, 8]) == by_hand(int(keys[2]), 8)
    assert len(np.unique(whole)) == 40
    assert not (counter.words(8, 5, 10) == whole[2]).any()
    assert (counter.words(-1, 0, 2) == counter.words(2**64 - 1, 0, 2)).all()


def test_draws_are_what_they_are_called() -> None:
    drawn = counter.words(0, 0, 200_000)
    flat = counter.uniforms(drawn) / counter.WIDE
    assert abs(flat).max() < 1
    assert (flat.astype(np.float32) == flat).all()  # exact
    assert [flat.mean(), flat.std()] == pytest.approx([0, 3**-0.5], abs=3e-3)
    bell = counter.bell(drawn).astype(np.float64)
    assert abs(bell).max() <= 131070
    assert [bell.mean() / 37837, bell.std() / 37837] == pytest.approx([0, 1], abs=5e-3)
    assert (bell**4).mean() / bell.var() ** 2 == pytest.approx(2.7, abs=0.03)  # of a normal one 3
    signs = counter.signs(drawn)
    assert set(signs.tolist()) == {-1, 1}
    assert abs(signs.mean()) < 5e-3
