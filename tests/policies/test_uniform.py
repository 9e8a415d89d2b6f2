"""Every site keeps the same share of its own cost."""

from __future__ import annotations

from fractions import Fraction

import pytest

from lowrank.policies import Uniform
from lowrank.types import Budget

from .curves import budget, curve, some_curves, spent


def rank_by_protocol(shape: tuple[int, int], keep: Fraction) -> int:
    """The largest rank with cost ≤ keep · out · in (methods/llm.md §7)."""
    return int(keep * shape[0] * shape[1] / sum(shape))


@pytest.mark.parametrize("keep", ["0.25", "0.4", "0.6", "0.8", "0.9"])
def test_the_rank_is_the_largest_whose_cost_is_within_the_share(keep: str) -> None:
    shapes = [(64, 64), (64, 172), (172, 64), (32, 64), (100, 40)]
    curves = [curve(f"layer{i}", shape) for i, shape in enumerate(shapes)]
    found = Uniform()(curves, budget(curves, keep))
    for one, shape in zip(curves, shapes, strict=True):
        assert found[one.sites].size == (rank_by_protocol(shape, Fraction(keep)),)


def test_no_site_is_below_the_protocol_nor_a_whole_number_above_its_share() -> None:
    for seed in range(30):
        curves = some_curves(seed, count=6, sizes=(16, 60))
        keep = Fraction(30 + seed, 64)
        found = Uniform()(curves, budget(curves, keep))
        for one in curves:
            option, share = found[one.sites], keep * one.dense.cost.params
            best = max(o.cost.params for o in one.options if o.cost.params <= share)
            assert best <= option.cost.params < share + 1


def test_a_site_above_its_share_keeps_its_smallest_form_and_the_others_give_way() -> None:
    tiny = curve("tiny", (4, 4))  # rank one costs 8 of 16
    large = [curve(f"large{i}", (40, 60)) for i in range(3)]
    keep = "0.45"
    found = Uniform()([tiny, *large], budget([tiny, *large], keep))
    assert found[tiny.sites].size == (1,)
    assert spent(found) <= budget([tiny, *large], keep).limit
    ranks = {found[one.sites].size for one in large}
    assert len(ranks) == 1  # equals are treated alike
    alone = Uniform()(large, budget(large, keep))
    assert ranks.pop()[0] <= alone[large[0].sites].size[0]


def test_many_sites_above_their_share_still_fit() -> None:
    tiny = [curve(f"tiny{i}", (4, 4)) for i in range(12)]
    large = curve("large", (30, 30))
    limit = Budget(12 * 8 + 3 * 60 + 5)
    found = Uniform()([*tiny, large], limit)
    assert spent(found) <= limit.limit
    assert all(found[one.sites].size == (1,) for one in tiny)
    assert found[large.sites].size == (3,)


def test_only_dense_sites_count_against_the_others() -> None:
    fixed = curve("fixed", (1, 200))  # no rank makes it smaller
    large = curve("large", (20, 20))
    found = Uniform()([fixed, large], Budget(200 + 130))
    assert found[fixed.sites].dense
    assert found[large.sites].size == (3,)  # 120 ≤ 130 < 160
