"""How many components a ratio keeps: what the policy "uniform" would, within what is there."""

from __future__ import annotations

import pytest

from lowrank import LowrankError
from lowrank.nn import LowRankLinear
from lowrank.policies import policy_of
from lowrank.policies.common import nearly_free_alignment
from lowrank.recover.components import Components, Stack
from lowrank.types import Budget, Cost, Curve, Option

SHAPES = [(64, 64), (16, 64), (172, 64), (64, 172), (1024, 1024)]


def stack(rows: int, columns: int, rank: int) -> Stack:
    layer = LowRankLinear.empty(in_features=columns, out_features=rows, rank=rank, bias=False)
    return Stack({"x": layer}, rank, rows + columns, rows * columns)


def made(ratio: float) -> Components:
    stacks = [stack(m, n, max(int(ratio * m * n) // (m + n), 1)) for m, n in SHAPES]
    return Components(stacks, {}, sum(s.dense for s in stacks), 0)


def by_policy(parts: Components, ratio: float) -> list[int]:
    """The ranks that "uniform" chooses from every rank below break-even."""
    curves = []
    for number, part in enumerate(parts.stacks):
        ranks = range(1, (part.dense - 1) // part.each + 1)
        costs = [(r, r * part.each) for r in ranks]
        options = [Option("x", (r,), "factors", Cost(c, 4 * c, c), 1 / r) for r, c in costs]
        dense = Option("dense", None, "dense", Cost(part.dense, 4 * part.dense, part.dense), 0.0)
        curves.append(Curve((str(number),), [*options, dense], 2.0, None, "weight", True))
    chosen = policy_of("uniform")(curves, Budget(int(ratio * parts.dense)), None)
    chosen = nearly_free_alignment(curves, chosen, "params")
    return [chosen[str(number),].size[0] for number in range(len(curves))]  # type: ignore[index]


@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.625, 0.5, 0.25])
def test_they_are_those_of_the_policy(ratio: float) -> None:
    parts = made(0.9)
    ranks = parts.ranks(ratio)
    assert ranks == by_policy(parts, ratio)
    assert ranks[-1] % 8 == 0  # of 1024 outputs: nearly free


def test_what_a_small_layer_leaves_goes_to_the_others() -> None:
    parts = Components([stack(40, 40, 2), stack(40, 40, 20)], {}, 2 * 40 * 40, 0)
    assert parts.ranks(0.4) == [2, 14]  # 1,280 numbers at most, of which the first takes 160
    assert parts.ranks(0.1) == [2, 2]
    assert parts.ranks(0.55) == [2, 20]


def test_what_is_stored_besides_counts_and_is_not_cut() -> None:
    stacks = made(0.9).stacks
    dense = sum(s.dense for s in stacks)
    parts = Components(stacks, {}, dense + 100_000, 50_000)
    ranks = parts.ranks(0.6)
    stored = sum(s.each * r for s, r in zip(stacks, ranks, strict=True))
    assert 0.595 < (stored + 50_000) / (dense + 100_000) <= 0.6


def test_the_least_ratio_is_named() -> None:
    parts = made(0.9)
    with pytest.raises(LowrankError, match=r"is 0\.00\d+ of the dense weights") as caught:
        parts.ranks(0.001)
    least = float(str(caught.value).split(" is ")[1].split()[0])
    assert set(parts.ranks(least)) == {1}
