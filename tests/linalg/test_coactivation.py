"""Groups of neurons: those that are active together are found, in equal parts, always the same."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.linalg.coactivation import balanced, coactive_groups


def planted(groups: int = 4, size: int = 6, inputs: int = 200) -> tuple[Tensor, Tensor]:
    """Energy (inputs, neurons) of neurons that are active in groups, and their groups."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(groups * size)[torch.randperm(groups * size, generator=draw)] % groups
    topic = torch.randint(groups, (inputs,), generator=draw)
    strong = (labels == topic[:, None]).double()
    return strong + 0.05 * torch.rand(inputs, groups * size, generator=draw), labels


def test_planted_groups_are_found() -> None:
    energy, labels = planted()
    found = coactive_groups(energy, 4, 1)
    pairs = {(int(a), int(b)) for a, b in zip(labels, found, strict=True)}
    assert len(pairs) == 4  # one name of each group for the other


def test_groups_are_equal_and_repeat_by_seed() -> None:
    energy = torch.rand(50, 24, generator=torch.Generator().manual_seed(1))
    found = coactive_groups(energy, 3, 2, seed=5)
    assert found.bincount().tolist() == [8, 8, 8]
    assert torch.equal(found, coactive_groups(energy, 3, 2, seed=5))
    assert not torch.equal(found, coactive_groups(energy, 3, 2, seed=6))


def test_more_energy_is_held_than_by_neurons_as_they_stand() -> None:
    energy, _ = planted()

    def held(labels: Tensor) -> float:
        sums = energy @ torch.nn.functional.one_hot(labels, 4).double()
        return float(sums.max(1).values.sum())

    assert held(coactive_groups(energy, 4, 1)) > 2 * held(torch.arange(24) // 6)


def test_groups_follow_what_a_linear_rule_can_foresee() -> None:
    """Half of the neurons act by turns at random, half by the sign of an input."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=draw)
    seen = torch.stack([x[:, 0] > 0, x[:, 0] <= 0], 1).repeat_interleave(4, 1)
    coin = torch.rand(400, generator=draw) < 0.5
    unseen = torch.stack([coin, ~coin], 1).repeat_interleave(4, 1)
    energy = torch.cat([seen * 1.0, unseen * 1.2], 1) + 0.01

    def apart(labels: Tensor) -> bool:
        return len({*labels[:4].tolist()}) == len({*labels[4:8].tolist()}) == 1

    found = coactive_groups(energy, 2, 1, inputs=x)
    assert apart(found)
    assert not set(found[:4].tolist()) & set(found[4:8].tolist())
    blind = coactive_groups(energy, 2, 1)
    assert {*blind[8:12].tolist()} != {*blind[12:].tolist()}


def test_the_group_that_is_chosen_most_is_the_first() -> None:
    _, labels = planted()
    often = torch.randint(4, (200,), generator=torch.Generator().manual_seed(0)).clamp(min=2)
    energy = (labels == often[:, None]).double() + 0.01
    found = coactive_groups(energy, 4, 1)
    assert set(found[labels == 2].tolist()) == {0}
    assert set(found[labels == 3].tolist()) == {1}


def test_neurons_that_never_act_are_grouped_too() -> None:
    energy = torch.zeros(10, 8)
    assert coactive_groups(energy, 4, 2).bincount().tolist() == [2, 2, 2, 2]


def test_a_full_group_keeps_those_that_lose_most_elsewhere() -> None:
    scores = torch.tensor([[5.0, 4.0], [5.0, 0.0], [5.0, 1.0], [1.0, 0.0]])
    assert balanced(scores).tolist() == [1, 0, 0, 1]
    assert balanced(torch.ones(6, 1)).tolist() == [0] * 6
