"""Pufferfish: the switch is a truncated SVD, by the clock, and decay goes on after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from lowrank.nn import LowRankLinear
from lowrank.train import Pufferfish
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import Net, batches, run


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def product(model: nn.Module, name: str) -> np.ndarray:
    module = model.get_submodule(name)
    dense = module.dense_weight() if isinstance(module, LowRankLinear) else module.weight
    return dense.detach().double().numpy().copy()


def test_pufferfish_switches_by_the_clock() -> None:
    """The switch is a truncated SVD at a quarter of the full rank; other state goes on."""
    model = Net()
    optimizer = sgd(model)
    controller = Pufferfish(model, optimizer, epochs=2, exclude_modules=["second"])
    run(model, optimizer, controller, 4)
    controller.end_epoch()
    assert type(model.first) is nn.Linear
    assert controller.switched is None
    run(model, optimizer, controller, 8, start=4)
    before = product(model, "first")
    bias = model.first.bias
    momentum = optimizer.state[bias]["momentum_buffer"].clone()
    controller.end_epoch()
    assert controller.switched == 2
    assert controller.ranks == {"first": 3}
    assert type(model.second) is nn.Linear
    u, s, v = np.linalg.svd(before)
    np.testing.assert_allclose(product(model, "first"), u[:, :3] * s[:3] @ v[:3], atol=1e-6)
    assert model.first.bias is bias
    assert torch.equal(optimizer.state[bias]["momentum_buffer"], momentum)
    check_same_parameters(optimizer, model)
    run(model, optimizer, controller, 12, start=8)
    controller.end_epoch()  # once and for all
    assert controller.ranks == {"first": 3}
    assert type(controller.finish().first) is LowRankLinear


def test_what_would_not_be_smaller_stays_dense() -> None:
    model = Net()
    controller = Pufferfish(model, sgd(model), epochs=1, share=0.9)
    controller.end_epoch()
    assert type(model.first) is type(model.second) is nn.Linear
    left = [event for event in controller.history if event["event"] == "left"]
    assert [event["site"] for event in left] == ["first", "second"]
    assert controller.switched == 1


def test_decay_goes_on_after_the_switch() -> None:
    model = Net()
    optimizer = sgd(model)
    controller = Pufferfish(model, optimizer, epochs=1, frobenius_decay=0.5)
    controller.end_epoch()
    x, y = next(batches(1))
    model(x, y)["loss"].backward()
    up, down = model.first.up.weight, model.first.down.weight
    plain = up.grad.clone()
    controller.before_step()
    torch.testing.assert_close(up.grad, plain + 0.5 * (up @ down @ down.T).detach())
