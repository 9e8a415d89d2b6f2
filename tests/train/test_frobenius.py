"""Frobenius decay of convolutions that were factored by design."""

from __future__ import annotations

import torch
from torch import nn

import lowrank
from lowrank.nn import ChannelConv
from lowrank.train import FrobeniusDecay

from ..nets import images, small_net


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
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    factored_linears = [
        m.dense_weight() for m in net.modules() if isinstance(m, lowrank.nn.LowRankLinear)
    ]
    (loss + 0.15 * sum(w.square().sum() for w in dense + factored_linears)).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
    optimizer.step()
    controller.after_step()
    assert controller.finish() is net
    assert [m for m in net.modules() if isinstance(m, ChannelConv)] == layers
    ends = [e for e in controller.history if e["event"] == "finish"]
    assert {e["rank"] for e in ends} >= {m.rank for m in layers}
