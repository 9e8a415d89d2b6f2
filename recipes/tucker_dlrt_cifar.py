"""TuckerDLRT on a small ResNet: ranks of convolutions found while training (arXiv 2305.19059).

Where LOWRANK_ASSETS names a folder with cifar10/resnet20.safetensors and cifar10_subset.npz, the
trained ResNet-20 is trained on for a few epochs of 2,000 images, its convolutions in Tucker form.
Else the same net, shallower and narrower, is trained from nothing on the digits of scikit-learn.

    python recipes/tucker_dlrt_cifar.py                # minutes
    python recipes/tucker_dlrt_cifar.py --full         # more epochs and seeds; hours

Beside it is what Kim et al. do (arXiv 1511.06530): Tucker ranks of the trained net by EVBMF, each
unfolding's own and no budget, and the same training afterwards; and the same number of weights in
equal shares. And beside each size that TuckerDLRT finds: the trained net cut to it at once, by the
weights alone ("tucker") or by the training images too ("two-sided"), and trained in the same way.

Removed are weights of convolutions, as the authors count. Nothing is quoted from the paper: its
tables are for whole CIFAR-10 and nets trained from nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import Images, accuracy, digits
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank
from lowrank import METHODS
from lowrank.linalg import evbmf_ranks
from lowrank.train import TuckerDLRT
from lowrank.types import Cost, Option

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep


class Block(nn.Module):
    """Two convolutions and a shortcut that pads missing channels by zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(y + nn.functional.pad(short, (0, 0, 0, 0, self.more, self.more)))


class Net(nn.Module):
    """The ResNet of He et al. for small images (arXiv 1512.03385): three stages of blocks."""

    def __init__(self, channels: int = 3, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        sizes = [width, width, 2 * width, 4 * width]
        for stage in (1, 2, 3):
            blocks = [
                Block(sizes[stage - (i == 0)], sizes[stage], 2 if stage > 1 and i == 0 else 1)
                for i in range(depth)
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))  # type: ignore[operator]
        return self.linear(y.mean((2, 3)))


def cifar(folder: Path) -> Images:
    raw = np.load(folder / "cifar10_subset.npz")
    mean, deviation = (
        torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    x, test_x = (
        (torch.from_numpy(raw[f"x_{part}"]).permute(0, 3, 1, 2).float() / 255 - mean) / deviation
        for part in ("train", "test")
    )
    y, test_y = (torch.from_numpy(raw[f"y_{part}"]) for part in ("train", "test"))
    return Images("a subset of CIFAR-10", x, y, test_x, test_y)


def convs(model: nn.Module) -> int:
    """Numbers in the weights of all convolutions."""
    return sum(p.numel() for p in model.parameters() if p.ndim == 4)


def by_evbmf(model: nn.Module) -> nn.Module:
    """Every convolution but the first in Tucker form, at the ranks of its own two unfoldings."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "conv1"]
    for name, conv in layers:
        ranks = evbmf_ranks(conv.weight.detach().flatten(2))
        option = Option("tucker", ranks, "tucker", Cost(0, 0, 0), 0.0)  # its cost is not used
        model.set_submodule(name, METHODS["tucker"]().factor(conv, option, {}))
    return model


def cut(model: Any, method: str, left: int, images: Images) -> nn.Module:
    """Equal shares of every convolution but the first, so many numbers in all."""
    first = model.conv1.weight.numel()
    seen = None if method == "tucker" else list(images.x[:1500].split(50))
    small, _ = lowrank.compress(
        model, (left - first) / (convs(model) - first), method=method, policy="uniform", data=seen,
        align=1, progress=False, exclude_modules="conv1|linear",  # the first one alone
    )  # fmt: skip
    return small


def train(
    images: Images, start: Any, tolerance: float | str | None, seed: int, options: Any,
    left: int = 0,
) -> Any:  # fmt: skip
    """Accuracy at the end, the share of weights that was removed, and accuracy at the start.

    `tolerance`: of TuckerDLRT, None for none, "EVBMF", or a method that cuts to `left` numbers.
    """
    torch.manual_seed(seed)
    model: nn.Module = start()
    whole = convs(model)
    if tolerance == "EVBMF":
        model = by_evbmf(model)
    elif isinstance(tolerance, str):
        model = cut(model, tolerance, left, images)
    before = accuracy(model, images.test_x, images.test_y)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    controller = None
    if isinstance(tolerance, float):
        every = options.every
        controller = TuckerDLRT(model, optimizer, tolerance=tolerance, every=every, rank=1.0)
    steps = options.epochs * (len(images.x) // options.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(options.epochs):
        if controller is not None and epoch == options.epochs - options.settle:
            model, controller = controller.finish(), None  # the ranks are settled: train on
        order = torch.randperm(len(images.x))
        for rows in order[: len(order) // options.batch * options.batch].split(options.batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.x[rows]), images.y[rows]).backward()
            if controller is not None:
                controller.before_step()
            optimizer.step()
            if controller is not None:
                controller.after_step()
            schedule.step()
    model = model if controller is None else controller.finish()
    return accuracy(model, images.test_x, images.test_y), 1 - convs(model) / whole, before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="20 epochs, five seeds")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--settle", type=int, default=1, help="last epochs at fixed ranks")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    if options.full:
        options.epochs, options.settle, options.seeds = 20, 5, 5
    torch.set_num_threads(options.threads)
    assets = os.environ.get("LOWRANK_ASSETS")
    if assets:
        folder = Path(assets) / "cifar10"
        images, numbers = cifar(folder), load_file(folder / "resnet20.safetensors")

        def start() -> nn.Module:
            model = Net()
            model.load_state_dict(numbers, strict=False)  # without counters of batches
            return model
    else:
        images = digits(side=8)
        options.epochs, options.lr = 5 * options.epochs, 10 * options.lr

        def start() -> nn.Module:
            return Net(channels=1, width=8, depth=1)

    print(f"{images.name}: {len(images.x)} images to train, {len(images.test_x)} to test")
    print(f"at the start: {100 * accuracy(start(), images.test_x, images.test_y):.2f} %")
    print(
        f"{'tolerance':>12}{'accuracy %':>24}{'removed of convolutions %':>28}{'untrained %':>14}"
    )
    rows: list[dict[str, Any]] = []
    whole = convs(start())
    ways: list[Any] = [None, "EVBMF", "tucker"]
    for tolerance in options.tolerances:
        ways += [tolerance, "tucker", "two-sided"]
    left = 0
    for tolerance in ways:
        seeds = range(options.seeds)
        runs = [train(images, start, tolerance, seed, options, left) for seed in seeds]
        right = [100 * one[0] for one in runs]
        spread = f"{statistics.fmean(right):.2f} ({min(right):.2f}–{max(right):.2f})"
        removed = statistics.fmean(100 * one[1] for one in runs)
        if tolerance in ("EVBMF", *options.tolerances):
            left = round(whole * (1 - removed / 100))
        name = "dense" if tolerance is None else str(tolerance)
        rows.append({"tolerance": name, "accuracy": right, "removed": removed,
                     "before": 100 * runs[0][2]})  # fmt: skip
        print(f"{name:>12}{spread:>24}{removed:>28.1f}{100 * runs[0][2]:>14.2f}", flush=True)
    if options.write:
        keep("tucker_dlrt_cifar", rows, options.seeds - 1, settings=vars(options),
             gallery=shown(images, options, rows))  # fmt: skip


def shown(images: Images, options: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of TuckerDLRT, and of EVBMF before and after the same training."""
    dense, kim, equal, *ours = rows
    model = f"{'ResNet-20' if 'CIFAR' in images.name else 'a small ResNet'}, {images.name}"
    after = f"{options.epochs} epochs (dense {statistics.fmean(dense['accuracy']):.1f})"
    same = f"as many in equal shares {statistics.fmean(equal['accuracy']):.1f}"
    own = "weights of convolutions, own ranks of both unfoldings without a budget"
    found = [
        ("policies", "evbmf", f"{own}, with tucker, untrained", kim, kim["before"]),
        (
            "policies",
            "evbmf",
            f"{own}, with tucker, {after}; {same}",
            kim,
            statistics.fmean(kim["accuracy"]),
        ),
    ]
    for row, *others in zip(ours[::3], ours[1::3], ours[2::3], strict=True):
        cuts = ", ".join(f"{o['tolerance']} {statistics.fmean(o['accuracy']):.1f}" for o in others)
        setting = f"weights of convolutions, {after}; cut to it at once by {cuts}"
        found.append(("controllers", "TuckerDLRT", setting, row, statistics.fmean(row["accuracy"])))
    return [
        figure(kind, name, model, setting, 1 - row["removed"] / 100, "top-1, %", value)
        for kind, name, setting, row, value in found
    ]


if __name__ == "__main__":
    main()
