"""Least total error under the budget, against all combinations and the Lagrangian's bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lowrank.errors import LowrankError
from lowrank.policies import Spectrum, Uniform
from lowrank.types import Budget

from .curves import (
    budget,
    curve,
    dual_bound,
    falling,
    least_error,
    lost,
    some_curves,
    spent,
    whole,
)

KEEPS = ("0.45", "0.6", "0.75", "0.9")


def largest_step(curves) -> float:
    """The most that one step of a curve saves: what the Lagrangian may leave."""
    return max(
        one.options[i].error - one.options[j].error
        for one in curves
        for i in range(len(one.options))
        for j in range(i + 1, len(one.options))
    )


def test_small_instances_are_within_the_gap_of_all_combinations() -> None:
    near = []
    for seed in range(25):
        curves = some_curves(seed, count=4, sizes=(6, 14))
        for keep in KEEPS:
            limit = budget(curves, keep)
            if limit.limit < sum(one.options[0].cost.params for one in curves):
                continue
            found = Spectrum()(curves, limit)
            best, bound = least_error(curves, limit.limit), dual_bound(curves, limit.limit)
            assert spent(found) <= limit.limit
            assert bound <= best + 1e-9
            assert best - 1e-9 <= lost(found) <= bound + largest_step(curves) + 1e-9
            near.append(lost(found) <= best * 1.1 + 1e-9)
    assert sum(near) >= 0.8 * len(near)


def test_where_the_steps_fill_the_budget_it_is_the_optimum() -> None:
    """Equal squares with convex tails: every step costs the same, so that nothing is left over."""
    for seed in range(8):
        curves = [
            curve(name, (12, 12), np.sort(falling(12, 9 * seed + i))[::-1] * (1 + i))
            for i, name in enumerate("abc")
        ]
        flat = [replace(one, options=one.options[:-1]) for one in curves]  # without dense: convex
        for steps in (4, 6, 9, 12):
            limit = Budget(steps * 24)
            assert lost(Spectrum()(flat, limit)) == pytest.approx(least_error(flat, limit.limit))


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


def test_what_the_last_step_leaves_is_spent() -> None:
    for seed in range(10):
        curves = some_curves(seed, count=5, sizes=(10, 30))
        limit = budget(curves, "0.7")
        found = Spectrum()(curves, limit)
        left = limit.limit - spent(found)
        for one in curves:
            chosen = found[one.sites]
            better = [o for o in one.options if o.error < chosen.error]
            assert all(o.cost.params - chosen.cost.params > left for o in better)


def test_nothing_is_spent_where_no_error_is_left() -> None:
    exact = curve("exact", (20, 20), [2.0, 1.0] + [0.0] * 18)
    found = Spectrum()([exact], Budget(whole([exact])))
    assert found[exact.sites].size == (2,)


def test_norms_are_not_mixed() -> None:
    mixed = [curve("a", (8, 8)), curve("b", (8, 8), norm="output")]
    with pytest.raises(LowrankError, match=r"\['output', 'weight'\] cannot be added"):
        Spectrum()(mixed, Budget(100))


def test_bytes_are_counted_where_bytes_are_asked_for() -> None:
    """Of two equal weights the one in fewer bytes is cheaper to keep."""
    wide, narrow = curve("wide", (20, 20), itemsize=4), curve("narrow", (20, 20), itemsize=2)
    found = Spectrum()([wide, narrow], budget([wide, narrow], "0.6", "bytes"))
    assert found[narrow.sites].error < found[wide.sites].error
    assert spent(found, "bytes") <= budget([wide, narrow], "0.6", "bytes").limit
