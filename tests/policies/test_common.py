"""Counting, and rounding to aligned sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowrank.policies import Uniform
from lowrank.policies.common import (
    at_most,
    least_that_fits,
    nearly_free_alignment,
    only_aligned,
    smallest,
    spent,
)
from lowrank.types import Budget

from .curves import budget, curve, some_curves


def test_the_smallest_forms_are_summed() -> None:
    curves = some_curves(0, count=4)
    for unit in ("params", "bytes", "macs"):
        want = sum(one.options[0].cost.of(unit) for one in curves)
        assert smallest(curves, unit) == want
        assert spent([one.options[0] for one in curves], unit) == want


def test_the_largest_rank_not_above() -> None:
    one = curve("a", (20, 20))  # ranks 1…9
    assert at_most(one, 4).size == (4,)
    assert at_most(one, 19).size == (9,)
    assert at_most(one, 0) is None
    assert at_most(curve("thin", (1, 9)), 5) is None


def test_only_multiples_are_left_and_the_dense_weight() -> None:
    curves = [curve("a", (64, 64)), curve("b", (9, 9))]
    for align in (1, 3, 8):
        for before, after in zip(curves, only_aligned(curves, align), strict=True):
            kept = [o for o in before.options if o.dense or o.size[0] % align == 0]
            assert list(after.options) == kept
            assert after.dense == before.dense


NEARLY_FREE = [(801, 800), (807, 800), (808, 808), (809, 808), (815, 808), (799, 792), (803, 800)]
ONE_PERCENT = [(rank, rank) for rank in (1, 7, 9, 65, 99)]


@pytest.mark.parametrize(
    ("side", "rank", "want"),
    [*((2000, *row) for row in NEARLY_FREE), *((300, *row) for row in ONE_PERCENT)],
)
def test_a_rank_is_rounded_where_that_is_nearly_free(side: int, rank: int, want: int) -> None:
    one = curve("a", (side, side))
    chosen = {one.sites: at_most(one, rank)}
    assert nearly_free_alignment([one], chosen, "params")[one.sites].size == (want,)


def test_alignment_never_costs_more_than_one_percent_of_a_site() -> None:
    curves = [curve(f"l{i}", shape) for i, shape in enumerate([(500, 900), (300, 300), (64, 900)])]
    for keep in ("0.3", "0.55", "0.81"):
        before = Uniform()(curves, budget(curves, keep))
        after = nearly_free_alignment(curves, before, "params")
        for sites, option in after.items():
            assert (
                before[sites].cost.params * 0.99 < option.cost.params <= before[sites].cost.params
            )


def test_dense_options_are_left_alone() -> None:
    one = curve("a", (20, 20))
    chosen = {one.sites: one.dense}
    assert nearly_free_alignment([one], chosen, "params") == chosen


def test_a_multiple_that_the_curve_lacks_is_not_taken() -> None:
    """Ties left rank 800 out: the rank below it is no multiple."""
    one = curve("a", (2000, 2000))
    gap = [o for o in one.options if o.size != (800,)]
    holed = type(one)(one.sites, tuple(gap), one.total, None, "weight", True)
    chosen = {one.sites: at_most(one, 803)}
    assert nearly_free_alignment([holed], chosen, "params")[one.sites].size == (803,)


def test_the_same_rank_in_another_form_is_not_taken() -> None:
    """Ranks of a convolution's forms differ in cost: the multiple in another one may cost more."""
    one = curve("a", (2000, 2000))
    other = replace(at_most(one, 804), size=(800,), storage="spatial")
    mixed = replace(one, options=(*(o for o in one.options if o.size != (800,)), other))
    chosen = {one.sites: at_most(one, 803)}
    assert nearly_free_alignment([mixed], chosen, "params") == chosen


def test_the_search_finds_the_first_threshold_that_fits() -> None:
    one = curve("a", (30, 30))
    costs = [option.cost.params for option in one.options[::-1]]  # falling with the threshold
    thresholds = list(range(len(costs)))

    def choose(threshold: float):
        return {one.sites: one.options[::-1][int(threshold)]}

    for limit in range(costs[-1], costs[0] + 2):
        want = next(cost for cost in costs if cost <= limit)
        found = least_that_fits(thresholds, choose, Budget(limit), "test")
        assert found[one.sites].cost.params == want
