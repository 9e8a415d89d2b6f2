"""Every site loses the same share of its energy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowrank.errors import LowrankError
from lowrank.policies import Energy
from lowrank.types import Budget, Curve, Option

from .curves import budget, curve, some_curves, spent


def smallest_within(one: Curve, share: float) -> Option:
    """The cheapest option that loses no more than this share: by looking at all of them."""
    fitting = [o for o in one.options if o.error <= share * one.total]
    return min(fitting, key=lambda o: o.cost.params)


def test_the_threshold_is_the_best_of_all() -> None:
    for seed in range(20):
        curves = some_curves(seed, count=4, sizes=(8, 24))
        for keep in ("0.35", "0.6", "0.85"):
            limit = budget(curves, keep)
            shares = {o.error / one.total for one in curves for o in one.options}
            costs = [
                sum(smallest_within(one, share * (1 + 1e-12)).cost.params for one in curves)
                for share in shares
            ]
            best = max(cost for cost in costs if cost <= limit.limit)
            found = Energy()(curves, limit)
            assert spent(found) == best


def test_all_sites_are_cut_at_one_share() -> None:
    for seed in range(10):
        curves = some_curves(seed, count=5, sizes=(8, 24))
        found = Energy()(curves, budget(curves, "0.6"))
        most = max(found[one.sites].error / one.total for one in curves)
        for one in curves:
            assert found[one.sites] == smallest_within(one, most * (1 + 1e-12))


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1.0])
def test_a_given_share_is_met_by_the_smallest_option(share: float) -> None:
    curves = some_curves(4, count=5)
    found = Energy(share=share)(curves, Budget(0))
    for one in curves:
        option = found[one.sites]
        assert option.error <= (1 - share) * one.total
        smaller = [o for o in one.options if o.cost.params < option.cost.params]
        assert all(o.error > (1 - share) * one.total for o in smaller)


def test_the_whole_energy_of_a_weight_of_low_rank_is_kept_by_its_rank() -> None:
    exact = curve("exact", (20, 20), [3.0, 2.0, 1.0] + [0.0] * 17)
    assert Energy(share=1.0)([exact], Budget(0))[exact.sites].size == (3,)


def test_scale_does_not_matter() -> None:
    one = curve("a", (20, 30))
    options = tuple(replace(o, error=o.error * 1e9) for o in one.options)
    large = replace(one, sites=("b",), options=options, total=one.total * 1e9)
    found = Energy()([one, large], budget([one, large], "0.5"))
    assert found[("a",)].size == found[("b",)].size


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_outside_of_its_range_is_refused(share: float) -> None:
    with pytest.raises(LowrankError, match=r"must be in \(0, 1\], got"):
        Energy(share=share)
