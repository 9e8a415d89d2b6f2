"""lossaware: what is compared, in which errors, and by what. The knapsack has tests of its own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lowrank import LowrankError
from lowrank.policies import LossAware, Uniform
from lowrank.policies.knapsack import solve
from lowrank.types import Allocation, Budget, Cost, Curve, Option


def curve(names: tuple[str, ...], errors: list[float], step: int, norm: str = "fisher") -> Curve:
    options = [
        Option("m", (r + 1,), "factors", Cost(step * (r + 1), 0, 0), error)
        for r, error in enumerate(errors)
    ]
    dense = Option("dense", None, "dense", Cost(step * (len(errors) + 1), 0, 0), 0.0)
    return Curve(names, (*options, dense), 10.0, None, norm, True)


def test_errors_decide_and_the_sensitive_site_keeps_more() -> None:
    curves = [curve(("calm",), [0.3, 0.2, 0.1], 10), curve(("loud",), [30, 20, 10], 10)]
    found = LossAware()(curves, Budget(50))
    assert found[("loud",)].cost.params > found[("calm",)].cost.params


def test_the_probe_can_prefer_uniform() -> None:
    curves = [curve(("calm",), [0.3, 0.2, 0.1], 10), curve(("loud",), [30, 20, 10], 10)]
    uniform = Uniform()(curves, Budget(50))
    asked: list[dict] = []

    def probe(allocation):
        asked.append(dict(allocation))
        return 0.0 if allocation == uniform else 1.0

    assert LossAware()(curves, Budget(50), probe) == uniform
    assert len(asked) == 2
    chosen = LossAware()(curves, Budget(50), lambda a: 1.0 if a == uniform else 0.0)
    assert chosen != uniform


def test_other_norms_are_scaled_by_measured_kl() -> None:
    """Equal tails, but one site matters: the scale comes from the probe, one site at a time."""
    curves = [curve((name,), [3.0, 2.0, 1.0], 10, "output") for name in ("calm", "loud")]

    def probe(allocation):
        return sum(o.error * (50 if sites == ("loud",) else 1) for sites, o in allocation.items())

    found = LossAware()(curves, Budget(50), probe)
    assert found[("loud",)].dense
    assert not found[("calm",)].dense
    assert found[("calm",)].error in {3.0, 2.0, 1.0}  # errors are those of the curves again


def test_a_floor_holds() -> None:
    curves = [curve(("calm",), [0.3, 0.2, 0.1], 10), curve(("loud",), [30, 20, 10], 10)]
    uniform = Uniform()(curves, Budget(50))
    found = LossAware(floor=0.99)(curves, Budget(50))
    assert found[("calm",)].cost.params >= 0.99 * uniform[("calm",)].cost.params - 1


def test_errors_in_other_norms_are_not_added_but_kept_uniform() -> None:
    """As of layers that no data reached, beside those of the others."""
    seen = [curve(("calm",), [0.3, 0.2, 0.1], 10), curve(("loud",), [30, 20, 10], 10)]
    unseen = curve(("unseen",), [1e9, 1e8, 1e7], 10, "weight")
    curves = [unseen, *seen]
    uniform = Uniform()(curves, Budget(80))
    asked: list[Allocation] = []
    found = LossAware()(curves, Budget(80), lambda a: float(asked.append(a) or len(asked)))
    assert found[("unseen",)] == uniform[("unseen",)]
    assert found[("loud",)].cost.params > found[("calm",)].cost.params
    assert sum(option.cost.params for option in found.values()) <= 80
    assert all(set(each) == {c.sites for c in curves} for each in asked)


def test_refusals() -> None:
    one = curve(("a",), [1.0], 5)
    with pytest.raises(LowrankError, match="need at least 5 params"):
        LossAware()([one], Budget(4))
    with pytest.raises(LowrankError, match="share of lossaware"):
        LossAware(share=1.5)


def test_a_site_alone_and_in_a_group_is_refused() -> None:
    """Also where the group is made of whole sites: every site stands in one curve."""
    single = [curve((name,), [8.0, 4.0, 1.0], 10) for name in "abc"]
    for sites in (("a", "b"), ("b", "d")):
        with pytest.raises(LowrankError, match="b: in more than one curve"):
            LossAware()([*single, curve(sites, [2.0, 0.5], 12)], Budget(90))


def test_without_a_probe_errors_that_do_not_compare_leave_ranks_uniform() -> None:
    curves = [curve(("a",), [9.0, 1.0], 5, "output"), curve(("b",), [0.2, 0.1], 5, "output")]
    assert LossAware()(curves, Budget(20)) == Uniform()(curves, Budget(20))


@pytest.mark.parametrize("norm", ["fisher", "output"])
def test_an_allocation_that_breaks_the_model_is_the_worst(norm: str) -> None:
    """The probe gives Inf for it."""
    curves = [curve((name,), [8.0, 4.0, 1.0, 0.5], 10, norm) for name in "ab"]
    curves[0] = replace(curves[0], options=tuple(
        replace(o, error=100 * o.error) for o in curves[0].options
    ))  # fmt: skip
    uniform = dict(Uniform()(curves, Budget(50)))

    def probe(allocation: Allocation) -> float:
        broken = allocation[("b",)].cost.params < (20 if norm == "fisher" else 50)
        return math.inf if broken else 1.0

    found = LossAware()(curves, Budget(50 if norm == "fisher" else 60), probe)
    if norm == "fisher":
        assert solve(curves, Budget(50)).choice != uniform
        assert found == uniform
    else:  # b alone, at a share of its size, breaks it: it is left dense
        assert found[("b",)].dense
