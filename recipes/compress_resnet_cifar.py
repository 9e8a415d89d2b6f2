"""ResNet-20 on CIFAR-10, compressed after training: by weights, by outputs, and refitted.

    LOWRANK_ASSETS=… python recipes/compress_resnet_cifar.py [--keep 0.7 0.5 0.3] [--images 1000]
                                                            [--steps 0]

Budget: parameters of all convolutions but the first. Calibration on train images without labels
(an eighth held out for choosing ranks); top-1 on 761 test images, of which one standard error is 1
point; agreement: share of them on which dense and compressed net say the same. --steps adds
distillation. The folder holds cifar10/resnet20.safetensors and cifar10/cifar10_subset.npz.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad, relu

import lowrank
from lowrank import Effort, Recovery

WAYS: dict[str, dict[str, Any]] = {
    "svd, uniform": {"method": "svd"},
    "tucker, uniform": {"method": "tucker"},
    "whitened, uniform": {"method": "whitened"},
    "whitened, spectrum": {"method": "whitened", "policy": "spectrum"},
    "fast": {"effort": "fast"},
}


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut that drops positions and adds empty channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.more = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return relu(y + x)


class ResNet20(nn.Module):
    """He et al. (arXiv 1512.03385), section 4.2, shortcuts of type A; images (B, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=0)
    args = parser.parse_args()
    if "LOWRANK_ASSETS" not in os.environ:
        sys.exit("set LOWRANK_ASSETS to the folder that holds cifar10/resnet20.safetensors")
    folder = Path(os.environ["LOWRANK_ASSETS"]) / "cifar10"
    net = ResNet20().eval()
    net.load_state_dict(load_file(folder / "resnet20.safetensors"))
    with np.load(folder / "cifar10_subset.npz") as stored:
        train, test = normalised(stored["x_train"]), normalised(stored["x_test"])
        labels = torch.from_numpy(stored["y_test"]).long()
    said = predictions(net, test)
    print(f"dense: top-1 {share(said, labels):.2f} %, {sum(p.numel() for p in net.parameters()):,}")
    data = list(train[: args.images].split(50))
    seen = lowrank.calibrate(net, data, hold_out=1 / 8, progress=False)
    seen = lowrank.with_fisher(net, seen)
    ways = dict(WAYS)
    if args.steps:
        recovery = Recovery(distill_steps=args.steps, rows=50)
        ways[f"fast + {args.steps} steps"] = {"effort": Effort(recovery)}
    print(f"{'way':22} {'keep':>5} {'kept':>7} {'params':>8} {'top-1':>6} {'agree':>6} {'s':>6}")
    for keep in args.keep:
        for name, options in ways.items():
            started = time.perf_counter()
            lean, report = lowrank.compress(
                net, keep, data=seen, align=1, copy=True, progress=False,
                exclude_modules="conv1|linear", **options,
            )  # fmt: skip
            seconds, now = time.perf_counter() - started, predictions(lean, test)
            print(
                f"{name:22} {keep:5.2f} {report.achieved:7.4f} {report.params_after:8,} "
                f"{share(now, labels):6.2f} {share(now, said):6.2f} {seconds:6.1f}",
                flush=True,
            )


def normalised(images: Any) -> Tensor:
    """(N, 32, 32, 3) uint8 -> (N, 3, 32, 32), as the net was trained."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def predictions(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(part) for part in images.split(256)]).argmax(1)


def share(said: Tensor, truth: Tensor) -> float:
    """Per cent."""
    return 100 * float((said == truth).float().mean())


if __name__ == "__main__":
    main()
