"""Accuracy of small nets on digits: the output head dense or not, and the policies.

    python benchmarks/digits.py [--ratios 0.8 0.6 0.4 0.25]        # needs scikit-learn

scikit-learn's 1,797 digits of 8 × 8, the last fifth for testing. Columns: `head too`, uniform ranks
for all layers, the head among them; `uniform` and `spectrum` with it dense; `default`, what
compress(net, ratio, data=…) does; `no data`, what compress(net, ratio, data=None) does. All but the
last calibrate on 512 training images.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from machine import keep
from torch import Tensor, nn

import lowrank

EPOCHS = 30


class Residual(nn.Module):
    """y = x + conv(relu(conv(x))), through `inner` channels."""

    def __init__(self, width: int, inner: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, inner, kernel, padding=kernel // 2)
        self.second = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


def ends(*body: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def plain() -> nn.Module:
    layers: list[nn.Module] = []
    for wide, narrow in ((1, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(wide, narrow, 3, padding=1), nn.ReLU()]
    return ends(*layers, width=96)


def residual() -> nn.Module:
    blocks = [Residual(48, 48, 3), Residual(48, 48, 3)]
    return ends(nn.Conv2d(1, 48, 3, padding=1), *blocks, width=48)


def narrow() -> nn.Module:
    """Blocks through few or many channels, whose layers bear unlike ranks."""
    blocks = [Residual(48, 8, 3), Residual(48, 128, 1), Residual(48, 8, 3)]
    return ends(nn.Conv2d(1, 48, 3, padding=1), *blocks, width=48)


def mlp() -> nn.Module:
    flat = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*flat, nn.Linear(128, 10))


NETS = {"plain": plain, "residual": residual, "narrow": narrow, "mlp": mlp}
WAYS: dict[str, dict[str, Any]] = {
    "head too": {"policy": "uniform", "target_modules": "all"},
    "uniform": {"policy": "uniform"},
    "spectrum": {"policy": "spectrum"},
    "default": {},
    "no data": {"data": None},
}


def trained(name: str, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[name]()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def main() -> None:
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6, 0.4, 0.25])
    args = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels, split = torch.tensor(digits.target), len(images) * 4 // 5
    found = []
    print(f"{'net':9} {'dense':>6} {'ratio':>5} " + " ".join(f"{way:>9}" for way in WAYS))
    for name in NETS:
        net = trained(name, images[:split], labels[:split])

        def accuracy(model: nn.Module) -> float:
            with torch.no_grad():
                right = model(images[split:]).argmax(-1) == labels[split:]
            return float(right.float().mean())

        for ratio in args.ratios:
            row: dict[str, Any] = {"net": name, "ratio": ratio, "dense": accuracy(net)}
            for way, how in WAYS.items():
                options = {"data": [images[:512]], **how}
                lean, _ = lowrank.compress(net, ratio, copy=True, progress=False, **options)
                row[way] = accuracy(lean)
            found.append(row)
            values = " ".join(f"{row[way]:9.3f}" for way in WAYS)
            print(f"{name:9} {row['dense']:6.3f} {ratio:5.2f} {values}", flush=True)
    keep("digits", found, tested_on=len(images) - split)


if __name__ == "__main__":
    main()
