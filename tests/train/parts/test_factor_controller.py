"""What the controllers over plain factors, and LoQT, share beside refusals and resuming."""

from __future__ import annotations

import torch
from torch import nn

from tests.train.controllers import CONTROLLERS, EPOCH, EVERY
from tests.train.loops import Net, batches, sgd


@EVERY
def test_accelerate_accumulates(name: str) -> None:
    """Two halves of a batch, gradients synchronised at the second, are the whole batch.

    In float64: a size that a rounding error turns is another net from there on.
    """
    from accelerate import Accelerator

    def trained(parts: int) -> dict[str, torch.Tensor]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        model = Net().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model, optimizer = accelerator.prepare(model, optimizer)
        controller = CONTROLLERS[name](model, optimizer)
        for step, (x, y) in enumerate(batches(20)):
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                with accelerator.accumulate(model):
                    accelerator.backward(model(a.double(), b)["loss"])
                    controller.before_step()
                    optimizer.step()
                    controller.after_step()
                    optimizer.zero_grad()
            if (step + 1) % EPOCH == 0:
                controller.end_epoch()
        assert controller.state_dict()["step"] == 20
        return dict(controller.finish().state_dict())

    whole, halves = trained(1), trained(2)
    assert whole.keys() == halves.keys()
    for key, value in whole.items():
        torch.testing.assert_close(halves[key], value, rtol=1e-5, atol=1e-7)


@EVERY
def test_a_module_of_two_names(name: str) -> None:
    """Both names lead to one layer before, meanwhile, and afterwards."""
    torch.manual_seed(0)
    shared = nn.Linear(12, 12)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    optimizer = sgd(model)
    controller = CONTROLLERS[name](model, optimizer)
    assert model[0] is model[2]
    for _ in range(EPOCH):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().mean().backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
    controller.end_epoch()
    model = controller.finish()
    assert model[0] is model[2]
