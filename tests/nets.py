"""Small convolutional networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions with batch norms beside a shortcut, strided at will."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        plain = inputs == outputs and stride == 1
        self.down = None if plain else nn.Conv2d(inputs, outputs, 1, stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.down is None else self.down(x))).relu()


class SmallNet(nn.Module):
    """A stem, two stages of residual blocks, a linear classifier; images (B, 3, 12, 12)."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.stage2 = nn.Sequential(Residual(8, 12, 2), Residual(12, 12))
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x).relu()))
        return self.head(x.mean((2, 3)))


def small_net(seed: int = 0) -> SmallNet:
    """With batch statistics of random images, so that evaluation mode means something."""
    torch.manual_seed(seed)
    net = SmallNet()
    net.train()
    with torch.no_grad():
        for _ in range(5):
            net(images(16))
    return net.eval()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
