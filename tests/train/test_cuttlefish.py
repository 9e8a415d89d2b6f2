"""Cuttlefish: stable ranks against planted spectra, and the switch when they stand still."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank.train import Cuttlefish
from lowrank.train.cuttlefish import estimate, movement
from tests.train.loops import Net, run


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def spectrum(*values: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (12, 16)]
    (u, _), (v, _) = (torch.linalg.qr(m) for m in full)
    return v[:, : len(values)] @ torch.diag(torch.tensor(values).double()) @ u.T[: len(values)]


def test_cuttlefish_measures_and_switches_when_ranks_stand_still() -> None:
    model = Net(width=16)
    optimizer = sgd(model)
    model.first.weight = nn.Parameter(spectrum(*[1.0] * 12).float())  # stable rank 12
    optimizer = sgd(model)
    controller = Cuttlefish(
        model, optimizer, window=2, smooth=1, min_epochs=3, exclude_modules=["second"]
    )
    for epoch, values in enumerate([[2, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 1]]):
        with torch.no_grad():
            model.first.weight.copy_(spectrum(*values))
        assert controller.switched is None, epoch
        controller.end_epoch()
    # sr: 12, 6/4, 9/4, 9/4, 9/4; of the last two changes the mean is 0 after the fourth epoch
    np.testing.assert_allclose(
        controller.stable_ranks["first"], [12, 1.5, 2.25, 2.25, 2.25], rtol=1e-5
    )
    assert controller.switched == 4
    assert controller.ranks == {"first": 3}  # ⌈12/12 · 2.25⌉


def test_cuttlefish_waits_for_its_epochs_but_not_for_ever() -> None:
    for options, expected in (
        ({"min_epochs": 4, "window": 1, "tolerance": 100.0}, 4),
        ({"min_epochs": 1, "max_epochs": 3, "tolerance": 1e-12, "window": 1}, 3),
        ({"min_epochs": 1, "tolerance": 1e-12, "window": 1}, None),
        ({"min_epochs": 1, "window": 5, "tolerance": 100.0}, 5),
    ):
        model = Net()
        optimizer = sgd(model)
        controller = Cuttlefish(model, optimizer, **options)
        for _ in range(6):
            run(model, optimizer, controller, 2)
            controller.end_epoch()
        assert controller.switched == expected, options


def test_the_estimate_and_the_movement() -> None:
    assert estimate((64, 32), [16.0, 8.0, 3.3]) == 7  # ⌈32/16 · 3.3⌉
    assert estimate((64, 32), [16.0, 20.0]) == 32
    assert estimate((64, 32), [16.0, 0.1]) == 1
    assert movement([1.0, 2.0], 1, 2) == float("inf")
    assert movement([5.0, 1.0, 2.0, 4.0], 1, 2) == pytest.approx((1 + 2) / 2)
    means = [4.0, 4 - 0.5 * 4, 2 - 0.5 * 2]  # of 4, 0, 0 with weight 2/(3 + 1)
    expected = np.mean([abs(b - a) for a, b in itertools.pairwise(means)])
    assert movement([4.0, 0.0, 0.0], 3, 2) == pytest.approx(expected)
