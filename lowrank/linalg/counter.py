"""Random numbers from a counter: each is a function of seed, stream and place alone.

splitmix64 (Steele, Lea and Flood, OOPSLA 2014): the n-th word of a key is mix(key + n · golden
ratio). Only integers modulo 2⁶⁴ are multiplied, added and shifted, so that a number is the same on
every machine, in every thread and under every version of torch or NumPy, whose own generators
promise that to nobody. What is made of the words here is exact too: small integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

VERSION = 1  # of the draws: a file that names another cannot be rebuilt
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
WIDE = 1 << 24  # uniform draws are odd multiples of 1 / WIDE
Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]


def splitmix(keys: Words, start: int, count: int) -> Words:
    """Words start … start + count of every key, (keys, count).

    Args:
        keys: (keys,) uint64, each of a sequence of its own.
    """
    places = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    return _mixed(keys[:, None] + places * GOLDEN)


def keys_of(seed: int, start: int, count: int) -> Words:
    """Keys of the streams start … start + count of a seed, (count,)."""
    key = _mixed(np.array([seed % 2**64], dtype=np.uint64))
    keys: Words = splitmix(key, start, count)[0]
    return keys


def words(seed: int, stream: int, count: int) -> Words:
    """The first words of one stream, (count,) uint64."""
    found: Words = splitmix(keys_of(seed, stream, 1), 0, count)[0]
    return found


def uniforms(drawn: Words) -> Integers:
    """Odd integers, uniform in (−WIDE, WIDE): exact in float32, also divided by WIDE."""
    return 2 * (drawn >> np.uint64(40)).astype(np.int64) + 1 - WIDE


def bell(drawn: Words) -> Integers:
    """Integers in a bell around 0, of standard deviation 37,837: the sum of four uniform ones."""
    low = np.uint64(0xFFFF)
    parts: Any = sum(((drawn >> np.uint64(16 * n)) & low).astype(np.int64) for n in range(4))
    total: Integers = parts - 2 * 0xFFFF
    return total


def signs(drawn: Words) -> Integers:
    """±1."""
    return 1 - 2 * (drawn >> np.uint64(63)).astype(np.int64)


def _mixed(state: Words) -> Words:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
