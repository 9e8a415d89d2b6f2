"""lossaware: the least total error under the budget, against brute force."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from lowrank import LowrankError
from lowrank.policies import LossAware, Uniform
from lowrank.policies.lossaware import solve
from lowrank.types import Allocation, Budget, Cost, Curve, Option


def curve(names: tuple[str, ...], errors: list[float], step: int, norm: str = "fisher") -> Curve:
    options = [
        Option("m", (r + 1,), "factors", Cost(step * (r + 1), 0, 0), error)
        for r, error in enumerate(errors)
    ]
    dense = Option("dense", None, "dense", Cost(step * (len(errors) + 1), 0, 0), 0.0)
    return Curve(names, (*options, dense), 10.0, None, norm, True)


def falling(generator: random.Random, count: int) -> list[float]:
    return sorted((generator.uniform(0.1, 9) for _ in range(count)), reverse=True)


def brute(curves: list[Curve], limit: int) -> float:
    """The least error over every exact cover, by enumeration."""
    names = sorted({name for c in curves for name in c.sites})
    best = float("inf")
    for size in range(1, len(curves) + 1):
        for cover in itertools.combinations(curves, size):
            if sorted(name for c in cover for name in c.sites) != names:
                continue
            for options in itertools.product(*(c.options for c in cover)):
                if sum(o.cost.params for o in options) <= limit:
                    best = min(best, sum(o.error for o in options))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_within_the_gap_of_brute_force(seed: int) -> None:
    generator = random.Random(seed)
    curves = [curve((f"s{i}",), falling(generator, 4), 3 + i) for i in range(3)]
    curves.append(curve(("s0", "s1"), falling(generator, 3), 7))
    for limit in (18, 25, 33, 44):
        found, gap = solve(curves, Budget(limit))
        error = sum(o.error for o in found.values())
        best = brute(curves, limit)
        assert sum(o.cost.params for o in found.values()) <= limit
        assert sorted(n for sites in found for n in sites) == ["s0", "s1", "s2"]
        assert best - 1e-9 <= error <= best + gap + 1e-9


def test_a_cheap_group_is_taken_and_a_dear_one_is_not() -> None:
    singles = [curve((name,), [8.0, 4.0, 1.0], 10) for name in "ab"]
    good, bad = curve(("a", "b"), [2.0, 0.5], 12), curve(("a", "b"), [16.0, 15.0], 27)
    assert ("a", "b") in solve([*singles, good], Budget(30))[0]
    assert ("a", "b") not in solve([*singles, bad], Budget(60))[0]


def test_the_whole_budget_leaves_all_dense() -> None:
    curves = [curve((name,), [3.0, 1.0], 5) for name in "abc"]
    found, gap = solve(curves, Budget(45))
    assert all(option.dense for option in found.values())
    assert gap == pytest.approx(0)


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


def test_refusals() -> None:
    one, other = curve(("a",), [1.0], 5), curve(("b",), [1.0], 5, "weight")
    with pytest.raises(LowrankError, match="different norms"):
        LossAware()([one, other], Budget(15))
    with pytest.raises(LowrankError, match="need 5 params"):
        LossAware()([one], Budget(4))
    with pytest.raises(LowrankError, match="share of lossaware"):
        LossAware(share=1.5)
    torn = [curve(("a",), [1.0], 5), curve(("b",), [1.0], 5), curve(("b", "c"), [1.0], 5)]
    with pytest.raises(LowrankError, match="b: in more than one curve"):
        LossAware()(torn, Budget(30))


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
        assert solve(curves, Budget(50))[0] != uniform
        assert found == uniform
    else:  # b alone, at a share of its size, breaks it: it is left dense
        assert found[("b",)].dense
