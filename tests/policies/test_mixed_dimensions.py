"""Ranks by the lengths of tables: the rule, the budget, both ways to solve for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.methods.common import pivoted_curve
from lowrank.policies import MixedDimensions
from lowrank.policies.mixed_dimensions import sides
from lowrank.types import Budget, Curve

from ..methods.layers import linear, site
from .curves import budget, curve, spent

ROWS = (40, 300, 2000, 9000)
WIDTH = 16


def tables() -> list[Curve]:
    return [curve(f"table{n}", (n, WIDTH)) for n in ROWS]


def ranks(policy: MixedDimensions, keep: str) -> list[int]:
    """The width where a table stays dense."""
    chosen = policy(tables(), budget(tables(), keep))
    return [option.size[0] if option.size else WIDTH for option in chosen.values()]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("keep", ["0.1", "0.25", "0.5"])
def test_ranks_follow_the_rule_and_use_the_budget(alpha: float, keep: str) -> None:
    """λ d ∝ n^−α: no larger λ fits, by brute force."""
    found, limit = ranks(MixedDimensions(alpha=alpha), keep), budget(tables(), keep).limit

    def at(scale: float) -> list[int]:
        every = [min(WIDTH, max(1, math.floor(scale / n**alpha + 1e-9))) for n in ROWS]
        return [
            d if d * (n + WIDTH) < n * WIDTH else WIDTH for d, n in zip(every, ROWS, strict=True)
        ]

    def cost(every: list[int]) -> int:
        return sum(
            d * (n + WIDTH) if d < WIDTH else n * WIDTH for d, n in zip(every, ROWS, strict=True)
        )

    scales = [10 ** (k / 2000) for k in range(12000)]
    best = max((s for s in scales if cost(at(s)) <= limit), default=scales[0])
    assert found == at(best)


def test_without_alpha_the_smallest_table_stays_whole() -> None:
    found = ranks(MixedDimensions(alpha=None), "0.3")
    assert found[0] == WIDTH
    assert found == sorted(found, reverse=True)
    assert found[-1] < WIDTH / 3
    chosen = MixedDimensions(alpha=None)(tables(), budget(tables(), "0.3"))
    assert spent(chosen) > 0.8 * budget(tables(), "0.3").limit


def test_a_budget_below_the_steepest_rule_lowers_all() -> None:
    """α = 1 would keep the short tables whole, which a budget of rank one everywhere does not."""
    least = sum(n + WIDTH for n in ROWS)
    found = MixedDimensions(alpha=None)(tables(), Budget(least))
    assert [option.size for option in found.values()] == [(1,)] * 4
    with pytest.raises(LowrankError, match=f"mixed-dimensions needs at least {least:,} params"):
        MixedDimensions(alpha=None)(tables(), Budget(least - 1))


def test_sides_are_read_from_costs() -> None:
    assert [sides(one) for one in tables()] == [(n, WIDTH) for n in ROWS]
    layer = linear(30, 50)
    plain = lowrank.METHODS["svd"]().curve(site(layer), None)  # type: ignore[arg-type]
    assert sides(plain) == sides(pivoted_curve(plain, site(layer))) == (50, 30)


def test_tables_of_a_model_before_it_is_trained() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(50, 8), nn.EmbeddingBag(4000, 8, mode="sum")])
    model, report = lowrank.factorize_by_design(
        model, 0.3, policy=MixedDimensions(alpha=0.5), target_modules="all"
    )
    assert 0.2 < report.achieved <= 0.3
    assert type(model[0]) is nn.Embedding
    assert model[1].rank == 2
    with pytest.raises(LowrankError, match="mixed-dimensions gives ranks, but 0 is stored as quot"):
        lowrank.factorize_by_design(
            nn.ModuleList([nn.Embedding(500, 8)]), 0.3, method="quotient-remainder",
            policy="mixed-dimensions", target_modules="all",
        )  # fmt: skip


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_alpha_outside_is_refused(alpha: float) -> None:
    with pytest.raises(LowrankError, match=r"alpha must be in \[0, 1\] or None"):
        MixedDimensions(alpha=alpha)
