"""What every policy keeps: each site once, an option of its own curve, never above the budget."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from lowrank.errors import LowrankError
from lowrank.policies import POLICIES, Uniform, policy_of
from lowrank.types import UNITS, Budget, Unit

from .curves import budget, curve, some_curves, spent, whole

KEEPS = ("0.3", "0.5", "0.8", "0.99")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_site_gets_one_of_its_options_within_the_budget(name: str, unit: Unit) -> None:
    for seed in range(12):
        curves = some_curves(seed, count=7, sizes=(12, 50))
        for number, keep in enumerate(KEEPS):
            limit = budget(curves, keep, unit)
            chosen = policy_of(name)(curves, limit, None)
            assert set(chosen) == {one.sites for one in curves}
            assert all(chosen[one.sites] in one.options for one in curves)
            assert spent(chosen, unit) <= limit.limit
            if number == seed % len(KEEPS):
                assert dict(chosen) == dict(policy_of(name)(curves, limit, None))


@pytest.mark.parametrize("name", POLICIES)
def test_more_budget_never_means_less_kept(name: str) -> None:
    for seed in range(5):
        curves = some_curves(seed, count=5, sizes=(12, 50))
        kept = [
            spent(policy_of(name)(curves, budget(curves, Fraction(k, 20)), None))
            for k in range(6, 21)
        ]
        assert kept == sorted(kept)


@pytest.mark.parametrize("name", POLICIES)
def test_the_order_of_the_curves_does_not_matter(name: str) -> None:
    curves = some_curves(3, count=6, sizes=(12, 50))
    limit = budget(curves, "0.6")
    assert dict(policy_of(name)(curves, limit)) == dict(policy_of(name)(curves[::-1], limit))


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_for_everything_leaves_everything_dense(name: str) -> None:
    curves = some_curves(1, count=4)
    found = policy_of(name)(curves, Budget(whole(curves)))
    assert all(option.dense for option in found.values())


@pytest.mark.parametrize("name", POLICIES)
def test_an_unreachable_budget_is_an_error_that_names_the_least(name: str) -> None:
    curves = [curve("a", (10, 10)), curve("b", (6, 9))]
    least = 20 + 15
    found = policy_of(name)(curves, Budget(least))
    assert spent(found) == least
    with pytest.raises(LowrankError, match=f"at least {least} params, the budget is {least - 1}"):
        policy_of(name)(curves, Budget(least - 1))


@pytest.mark.parametrize("name", POLICIES)
def test_overlapping_curves_and_none_at_all_are_refused(name: str) -> None:
    one, other = curve("a", (10, 10)), curve("b", (8, 9))
    group = replace(one, sites=("b", "c"))
    with pytest.raises(LowrankError, match="b: in more than one curve"):
        policy_of(name)([one, other, group], Budget(100))
    with pytest.raises(LowrankError, match="no site can be factored"):
        policy_of(name)([], Budget(100))


@pytest.mark.parametrize("name", POLICIES)
def test_weights_that_cannot_shrink_stay_dense(name: str) -> None:
    curves = [curve("thin", (1, 30)), curve("dot", (2, 2)), curve("wide", (20, 40))]
    found = policy_of(name)(curves, budget(curves, "0.5"))
    assert found[("thin",)].dense
    assert found[("dot",)].dense
    assert not found[("wide",)].dense


@pytest.mark.parametrize("name", POLICIES)
def test_a_zero_weight_takes_the_smallest_form(name: str) -> None:
    curves = [curve("zero", (20, 20), [0.0] * 20), curve("other", (20, 20))]
    found = policy_of(name)(curves, budget(curves, "0.6"))
    assert found[("zero",)].size == (1,)


def test_names_and_objects() -> None:
    for name, cls in POLICIES.items():
        assert policy_of(name) == cls()
    mine = Uniform()
    assert policy_of(mine) is mine
    with pytest.raises(LowrankError, match=r"unknown policy 'unifrom'; did you mean 'uniform'\?"):
        policy_of("unifrom")
    with pytest.raises(LowrankError, match="a name or a callable, got int"):
        policy_of(3)
