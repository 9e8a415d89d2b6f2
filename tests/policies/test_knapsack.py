"""The one knapsack, against all combinations and the Lagrangian's bound."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from lowrank import LowrankError
from lowrank.policies.knapsack import solve
from lowrank.types import Budget, Cost, Curve, Option

from .curves import budget, curve, dual_bound, falling, least_error, lost, some_curves, spent, whole

KEEPS = ("0.45", "0.6", "0.75", "0.9")


def plain(name: str, errors: Sequence[float], step: int) -> Curve:
    """Options that cost step, 2 · step, …, whose errors follow no law; the dense one at the end."""
    options = [
        Option("m", (i + 1,), "factors", Cost(step * (i + 1), 0, 0), error)
        for i, error in enumerate(errors)
    ]
    dense = Option("dense", None, "dense", Cost(step * (len(errors) + 1), 0, 0), 0.0)
    return Curve((name,), (*options, dense), 10.0, None, "fisher", True)


def uneven(seed: int) -> list[Curve]:
    generator = random.Random(seed)
    return [
        plain(f"s{i}", sorted((generator.uniform(0.1, 9) for _ in range(4)), reverse=True), 3 + i)
        for i in range(4)
    ]


def largest_step(curves: Sequence[Curve]) -> float:
    """The most that one step of a curve saves: what the Lagrangian may leave."""
    return max(
        one.error - other.error
        for single in curves
        for one, other in itertools.combinations(single.options, 2)
    )


@pytest.mark.parametrize("seed", range(12))
def test_between_the_best_combination_and_one_step_above_the_bound(seed: int) -> None:
    """Neither on hulls nor off them can a combination be below the bound."""
    for curves in (uneven(seed), some_curves(seed, count=4, sizes=(6, 14))):
        least = sum(one.options[0].cost.params for one in curves)
        for keep in KEEPS:
            limit = budget(curves, keep)
            if limit.limit < least:
                continue
            solution = solve(curves, limit)
            best = least_error(curves, limit.limit)
            assert spent(solution.choice) <= limit.limit
            assert solution.error == pytest.approx(lost(solution.choice))
            assert solution.bound <= best + 1e-9
            assert best - 1e-9 <= solution.error <= solution.bound + largest_step(curves) + 1e-9


def test_the_bound_is_that_of_the_best_price() -> None:
    for seed in range(10):
        curves = some_curves(seed, count=5, sizes=(6, 20))
        for keep in KEEPS:
            limit = budget(curves, keep)
            if limit.limit >= sum(one.options[0].cost.params for one in curves):
                want = dual_bound(curves, limit.limit)
                assert solve(curves, limit).bound == pytest.approx(want, rel=1e-9)


def test_it_is_mostly_the_best_combination_or_near_it() -> None:
    near = []
    for seed in range(25):
        curves = some_curves(seed, count=4, sizes=(6, 14))
        for keep in KEEPS:
            limit = budget(curves, keep)
            if limit.limit >= sum(one.options[0].cost.params for one in curves):
                best = least_error(curves, limit.limit)
                near.append(solve(curves, limit).error <= best * 1.1 + 1e-9)
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
            solution = solve(flat, Budget(steps * 24))
            assert solution.error == pytest.approx(least_error(flat, steps * 24))
            assert solution.bound == pytest.approx(solution.error)


def test_on_straight_lines_it_is_the_optimum() -> None:
    """Steps of one rate, up to rounding: none is taken before the one that it builds on."""
    for count in range(2, 12):
        curves = [plain(name, [0.1 * (count - i) for i in range(count)], 1) for name in "ab"]
        for limit in range(2, 2 * count + 3):
            error = solve(curves, Budget(limit)).error
            assert error == pytest.approx(least_error(curves, limit), abs=1e-12)


def test_what_the_last_step_leaves_is_spent() -> None:
    for seed in range(10):
        curves = some_curves(seed, count=5, sizes=(10, 30))
        limit = budget(curves, "0.7")
        choice = solve(curves, limit).choice
        left = limit.limit - spent(choice)
        for one in curves:
            chosen = choice[one.sites]
            better = [o for o in one.options if o.error < chosen.error]
            assert all(o.cost.params - chosen.cost.params > left for o in better)


def test_the_rest_goes_where_a_unit_saves_most() -> None:
    """The steepest step does not fit. Of 4 units 2 that save 2 come before 4 that save 3."""
    steps = {"steep": (10, 15.0), "thrifty": (2, 2.0), "greedy": (4, 3.0)}
    curves = []
    for name, (more, saved) in steps.items():
        options = (
            Option("m", (1,), "factors", Cost(1, 0, 0), 20.0),
            Option("m", (2,), "factors", Cost(1 + more, 0, 0), 20.0 - saved),
            Option("dense", None, "dense", Cost(100, 0, 0), 0.0),
        )
        curves.append(Curve((name,), options, 20.0, None, "fisher", True))
    choice = solve(curves, Budget(3 + 4)).choice
    sizes = {sites[0]: option.size for sites, option in choice.items()}
    assert sizes == {"steep": (1,), "thrifty": (2,), "greedy": (1,)}


def test_nothing_is_spent_where_no_error_is_left() -> None:
    exact = curve("exact", (20, 20), [2.0, 1.0] + [0.0] * 18)
    solution = solve([exact], Budget(whole([exact])))
    assert solution.choice[exact.sites].size == (2,)
    assert solution.bound == pytest.approx(0, abs=1e-12)


def test_bytes_are_counted_where_bytes_are_asked_for() -> None:
    """Of two equal weights the one in fewer bytes is cheaper to keep."""
    wide, narrow = curve("wide", (20, 20), itemsize=4), curve("narrow", (20, 20), itemsize=2)
    limit = budget([wide, narrow], "0.6", "bytes")
    choice = solve([wide, narrow], limit).choice
    assert choice[narrow.sites].error < choice[wide.sites].error
    assert spent(choice, "bytes") <= limit.limit


@pytest.mark.parametrize("seed", range(6))
def test_floors_leave_the_best_of_what_they_allow(seed: int) -> None:
    """As if the smaller options were not there; options keep their own errors."""
    curves = uneven(seed)
    floors = {curves[0].sites: 10, curves[2].sites: 11, curves[3].sites: 10**9}
    allowed = [
        replace(one, options=tuple(
            o for o in one.options
            if o.dense or o.cost.params >= floors.get(one.sites, 0)
        ))
        for one in curves
    ]  # fmt: skip
    limit = budget(curves, "0.8")
    assert solve(curves, limit, floors=floors) == solve(allowed, limit)
    assert solve(curves, limit, floors=floors).error >= solve(curves, limit).error


@pytest.mark.parametrize("seed", range(6))
def test_weights_multiply_errors_and_options_stay_as_they_were(seed: int) -> None:
    curves = uneven(seed)
    weights = {one.sites: 2.0**i for i, one in enumerate(curves)}
    scaled = [
        replace(one, options=tuple(
            replace(o, error=weights[one.sites] * o.error) for o in one.options
        ))
        for one in curves
    ]  # fmt: skip
    limit = budget(curves, "0.6")
    solution, want = solve(curves, limit, weights=weights), solve(scaled, limit)
    assert (solution.error, solution.bound) == (want.error, want.bound)
    for one in curves:
        assert solution.choice[one.sites] in one.options
        assert solution.choice[one.sites].size == want.choice[one.sites].size


def test_equal_sites_are_told_apart_by_name_and_not_by_order() -> None:
    curves = [plain(name, [5.0, 2.0, 1.0], 4) for name in "abcd"]
    for limit in range(16, 65):
        forth, back = (solve(order, Budget(limit)) for order in (curves, curves[::-1]))
        assert forth == back


def test_refusals() -> None:
    one, other = plain("a", [1.0], 5), plain("b", [1.0], 5)
    with pytest.raises(LowrankError, match="no site can be factored"):
        solve([], Budget(10))
    with pytest.raises(LowrankError, match="a: in more than one curve"):
        solve([one, other, replace(one, sites=("c", "a"))], Budget(30))
    with pytest.raises(LowrankError, match="different norms cannot be added: fisher, weight"):
        solve([one, replace(other, norm="weight")], Budget(30))
    with pytest.raises(LowrankError, match="need at least 10 params, the budget is 9"):
        solve([one, other], Budget(9))
    with pytest.raises(LowrankError, match="the floors need at least 15 params, the budget is 14"):
        solve([one, other], Budget(14), floors={one.sites: 6})
