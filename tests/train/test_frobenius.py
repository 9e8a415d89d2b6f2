"""Frobenius decay is that of the product, of linear layers and of convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.nn import ChannelConv
from lowrank.train import Cuttlefish, FrobeniusDecay, Pufferfish
from tests.nets import images, small_net
from tests.train.loops import Net, batches, run


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


@pytest.mark.parametrize("factored", [True, False])
def test_decay_is_that_of_the_product(factored: bool) -> None:
    """T14: autograd of λ/2 · ‖UV‖², of a dense weight λ/2 · ‖W‖²."""
    model = Net()
    if factored:
        model, _ = lowrank.factorize_by_design(model, 0.5, target_modules=["first", "second"])
        controller: Any = FrobeniusDecay(model, sgd(model), strength=0.3)
    else:
        controller = Cuttlefish(model, sgd(model), frobenius_decay=0.3)
    x, y = next(batches(1))
    loss = model(x, y)["loss"]
    names = ["first", "second"]
    dense = [m.dense_weight() if factored else m.weight for m in map(model.get_submodule, names)]
    loss.backward(retain_graph=True)
    controller.before_step()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (loss + 0.15 * sum(w.square().sum() for w in dense)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_decay_is_that_of_the_product_of_filters_too() -> None:
    """T14: the gradient of λ/2 · ‖W‖², by autograd; layers stay what they are."""
    net, _ = lowrank.factorize_by_design(small_net(), 0.5)
    layers = [m for m in net.modules() if isinstance(m, ChannelConv)]
    assert layers
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    controller = FrobeniusDecay(net, optimizer, strength=0.3)
    loss = nn.functional.cross_entropy(net(images(6)), torch.arange(6) % 5)
    dense = [m.dense_weight() for m in layers]
    loss.backward(retain_graph=True)
    controller.before_step()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    factored_linears = [
        m.dense_weight() for m in net.modules() if isinstance(m, lowrank.nn.LowRankLinear)
    ]
    (loss + 0.15 * sum(w.square().sum() for w in dense + factored_linears)).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    optimizer.step()
    controller.after_step()
    assert controller.finish() is net
    assert [m for m in net.modules() if isinstance(m, ChannelConv)] == layers
    ends = [e for e in controller.history if e["event"] == "finish"]
    assert {e["rank"] for e in ends} >= {m.rank for m in layers}


def test_decay_does_not_go_with_the_optimizers() -> None:
    model, _ = lowrank.factorize_by_design(Net(), 0.5)
    with pytest.raises(LowrankError, match=r"decays the weight of first .*weight_decay=0"):
        FrobeniusDecay(model, sgd(model, weight_decay=1e-4))
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    groups = [{"params": rest}, {"params": biases, "weight_decay": 0.1}]
    controller = FrobeniusDecay(model, torch.optim.SGD(groups, lr=0.1))  # no claim was left
    with pytest.raises(LowrankError, match="already has a controller"):
        FrobeniusDecay(model, torch.optim.SGD(groups, lr=0.1))
    assert controller.finish() is model
    dense = Net()
    with pytest.raises(LowrankError, match="decays the weight of first"):
        Pufferfish(dense, sgd(dense, weight_decay=1e-4), epochs=1, frobenius_decay=0.1)
    Pufferfish(dense, sgd(dense, weight_decay=1e-4), epochs=1)
    with pytest.raises(LowrankError, match="nothing to adapt"):
        FrobeniusDecay(Net(), sgd(Net()))


def test_spectral_start_and_decay_train_together() -> None:
    model, _ = lowrank.factorize_by_design(Net(), 0.5)
    optimizer = sgd(model)
    controller = FrobeniusDecay(model, optimizer, strength=1e-3)
    losses = run(model, optimizer, controller, 100)
    assert sum(losses[-8:]) < 0.3 * sum(losses[:8])
