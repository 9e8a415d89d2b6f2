"""Least total error under the budget; how it is found is tested in test_knapsack.py."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank.errors import LowrankError
from lowrank.policies import Spectrum, Uniform
from lowrank.types import Budget

from .curves import budget, curve, lost, some_curves


def test_it_loses_less_than_uniform() -> None:
    for seed in range(10):
        curves = some_curves(seed, count=8, sizes=(16, 50))
        for keep in ("0.5", "0.7", "0.9"):
            limit = budget(curves, keep)
            assert lost(Spectrum()(curves, limit)) <= lost(Uniform()(curves, limit)) * 1.001


def test_a_flat_weight_stays_dense_beside_one_that_falls_quickly() -> None:
    flat = curve("flat", (20, 20), np.ones(20))
    steep = curve("steep", (20, 20), 0.3 ** np.arange(20))
    found = Spectrum()([flat, steep], Budget(400 + 80))
    assert found[flat.sites].dense
    assert found[steep.sites].size == (2,)


def test_norms_are_not_mixed() -> None:
    mixed = [curve("a", (8, 8)), curve("b", (8, 8), norm="output")]
    with pytest.raises(LowrankError, match="cannot be added: output, weight"):
        Spectrum()(mixed, Budget(100))
