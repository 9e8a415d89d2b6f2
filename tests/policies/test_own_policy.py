"""A policy of one's own is one callable; what it says of itself is believed, and what it gives is
checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import lowrank
from lowrank import LowrankError
from lowrank.policies import POLICIES
from lowrank.types import Allocation, Budget, Curve, Probe
from tests.zoo import mlp


@dataclass(frozen=True)
class FirstThings:
    """Early layers stay dense as long as the later ones can still pay for it."""

    judges: ClassVar[bool] = False

    def __call__(self, curves: Sequence[Curve], budget: Budget, probe: Probe | None) -> Allocation:
        cost = {
            curve.sites: [option.cost.of(budget.unit) for option in curve.options]
            for curve in curves
        }
        least, left, chosen = sum(map(min, cost.values())), budget.limit, {}
        for curve in curves:
            least -= min(cost[curve.sites])
            fitting = [o for o in curve.options if o.cost.of(budget.unit) <= left - least]
            chosen[curve.sites] = fitting[-1]
            left -= fitting[-1].cost.of(budget.unit)
        return chosen


@pytest.fixture
def known() -> Iterator[None]:
    POLICIES["first-things"] = FirstThings
    yield
    del POLICIES["first-things"]


@pytest.mark.parametrize("policy", ["first-things", FirstThings()], ids=["by name", "object"])
@pytest.mark.usefixtures("known")
def test_it_shares_out_the_budget(policy: object) -> None:
    model = mlp(24, 40, 40, 16)
    small, report = lowrank.compress(  # type: ignore[arg-type]
        model, 0.7, policy=policy, target_modules="all"
    )
    first, *others = [s.size for s in report.plan.entries]
    assert first is None  # dense
    assert all(size is not None for size in others)
    assert 0.66 < report.achieved <= 0.7
    assert report.plan.entries[0].reason == "the policy keeps it dense"
    assert report.plan.settings["policy"] in ("first-things", "FirstThings")
    assert small(torch.randn(2, 24)).shape == (2, 16)
    again, _ = lowrank.apply(mlp(24, 40, 40, 16), lowrank.Plan.from_json(report.plan.to_json()))
    assert again.state_dict().keys() == small.state_dict().keys()


def test_a_site_that_it_forgets_is_named() -> None:
    def forgets(curves: Sequence[Curve], budget: Budget, probe: Probe | None) -> Allocation:
        return {curve.sites: curve.options[0] for curve in curves[1:]}

    with pytest.raises(LowrankError, match="the policy chose no option for 0"):
        lowrank.plan(mlp(24, 40, 16), 0.7, policy=forgets)
