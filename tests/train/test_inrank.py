"""InRank: ranks grow to what training explains, and nothing is lost on the way."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn

from lowrank.nn import LowRankLinear
from lowrank.train import InRank
from lowrank.train.inrank import explaining
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import one_layer, planted


def product(model: nn.Module, name: str) -> np.ndarray:
    module = model.get_submodule(name)
    dense = module.dense_weight() if isinstance(module, LowRankLinear) else module.weight
    return dense.detach().double().numpy().copy()


def test_inrank_grows_to_the_planted_rank() -> None:
    target = planted(40, 32, rank=6)
    model = one_layer(target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = InRank(model, optimizer, rank=2, buffer=4, share=0.99, warmup=20, every=10)
    assert controller.ranks == {"0": 6}
    assert controller.explained == {"0": 2}
    seen = []
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * (model[0].dense_weight() - target).square().sum()).backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        seen.append(controller.explained["0"])
        check_same_parameters(optimizer, model)
    assert all(a <= b for a, b in itertools.pairwise(seen))
    assert seen[:20] == [2] * 20
    assert controller.explained == {"0": 6}
    assert controller.ranks == {"0": 10}
    model = controller.finish()
    assert model[0].rank == 6
    np.testing.assert_allclose(product(model, "0"), target, atol=1e-3)
    check_same_parameters(optimizer, model)


def test_inrank_loses_nothing_as_it_grows_and_cuts_when_told() -> None:
    target = planted(40, 32, rank=12)
    model = one_layer(target)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    controller = InRank(model, optimizer, rank=1, buffer=2, share=0.9, warmup=1, every=1, steps=40)
    widths = []
    for step in range(42):
        optimizer.zero_grad()
        (0.5 * (model[0].dense_weight() - target).square().sum()).backward()
        controller.before_step()
        optimizer.step()
        before = product(model, "0")
        controller.after_step()
        if step + 1 < 40:
            np.testing.assert_allclose(product(model, "0"), before, atol=1e-12)
        widths.append(controller.ranks["0"])
    assert widths[0] == 3 < max(widths) <= 16
    assert controller.ranks == controller.explained
    assert widths[-1] == widths[39] < widths[38]


def test_explained_variance() -> None:
    values = torch.tensor([4.0, 2, 1, 0.1], dtype=torch.float64)

    def left(k: int) -> float:
        rest = np.array([0.0] * k + values.tolist()[k:])
        return 1 - rest.var() / values.numpy().var()

    for share in (0.3, 0.7, 0.9, 0.99):
        expected = next((k for k in range(1, 4) if left(k) > share), 4)
        assert explaining(values, share) == expected
    assert explaining(torch.ones(3), 0.5) == 3
