"""What the tests of training share: planted problems, small nets, and the loop itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def planted(rows: int = 20, columns: int = 16, rank: int = 4, seed: int = 0) -> Tensor:
    """A matrix (rows, columns) of this rank with singular values from 4 down to 1, float64."""
    generator = torch.Generator().manual_seed(seed)

    def basis(size: int) -> Tensor:
        full = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(full).Q

    values = torch.linspace(4, 1, rank, dtype=torch.float64)
    return basis(rows) @ torch.diag(values) @ basis(columns).T


def one_layer(target: Tensor, seed: int = 0) -> nn.Module:
    """A net of one linear layer without bias, with a weight of the target's shape."""
    torch.manual_seed(seed)
    rows, columns = target.shape
    return nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=target.dtype))


Loss = Callable[[Any, Tensor], Tensor]


def of_weight(model: Any, target: Tensor) -> Tensor:
    """½‖W − A‖² of the first layer."""
    return 0.5 * (model[0].weight - target).square().sum()


def of_outputs(model: Any, target: Tensor) -> Tensor:
    """½‖W − A‖² through the forward pass."""
    eye = torch.eye(target.shape[1], dtype=target.dtype)
    return 0.5 * (model(eye) - target.T).square().sum()


def fit(
    model: nn.Module,
    optimizer: Any,
    controller: Any,
    target: Tensor,
    steps: int,
    loss_of: Loss = of_weight,
) -> list[float]:
    """A by the user's own loop; the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, target)
        loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        losses.append(loss.item())
    return losses


class Net(nn.Module):
    """Two layers; gives its loss where targets are given, as transformers' models do."""

    def __init__(self, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(12, width)
        self.second = nn.Linear(width, 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.second(torch.tanh(self.first(x)))
        return y if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


class ConvNet(nn.Module):
    """The same map of 12 numbers, seen as 2×2 pixels of three channels, with two convolutions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = torch.tanh(self.second(torch.tanh(self.first(x.view(-1, 3, 2, 2)))))
        y = self.last(y.flatten(1))
        return y if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


def net_for(controller: str, seed: int = 0) -> nn.Module:
    """A small net that the controller of this name can adapt."""
    return ConvNet(seed) if controller == "TuckerDLRT" else Net(seed)


def data(rows: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(rows, 12, generator=generator)
    teacher = torch.randn(12, 3, generator=generator) @ torch.randn(3, 10, generator=generator)
    return x, torch.tanh(x @ teacher / 4)


def batches(steps: int, size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches in the same order every time."""
    x, y = data()
    for step in range(steps):
        at = step * size % len(x)
        yield x[at : at + size], y[at : at + size]


def run(
    model: nn.Module,
    optimizer: Any,
    controller: Any,
    steps: int,
    *,
    start: int = 0,
    each: Callable[[int], None] | None = None,
) -> list[float]:
    """Steps start…steps of the plain loop; the losses."""
    losses = []
    for step, (x, y) in enumerate(batches(steps)):
        if step < start:
            continue
        optimizer.zero_grad()
        loss = model(x, y)["loss"]
        loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        losses.append(loss.item())
        if each is not None:
            each(step)
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def snapshot(model: nn.Module, optimizer: Any) -> tuple[Any, ...]:
    """All that a refusal must leave as it was."""
    return (
        [id(p) for g in optimizer.param_groups for p in g["params"]],
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        [(name, type(module)) for name, module in model.named_modules()],
    )


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    equal = all(torch.equal(a[1][key], b[1][key]) for key in a[1].keys() | b[1].keys())
    return a[0] == b[0] and equal and str(a[2]) == str(b[2]) and a[3] == b[3]
