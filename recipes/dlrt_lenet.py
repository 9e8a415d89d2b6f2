"""DLRT on LeNet-5: how many of the weights can go while the net is trained (arXiv 2205.13571)?

LeNet-5 is trained dense, and once for every tolerance with its two linear layers at ranks that DLRT
finds and its second convolution at ranks that TuckerDLRT finds, both on one optimizer. After a part
of the epochs the ranks are settled: the factored net trains on like any other. Removed are weights,
as the authors count: convolutions and linear layers, no biases.

    python recipes/dlrt_lenet.py                    # the digits of scikit-learn, minutes
    python recipes/dlrt_lenet.py --mnist FOLDER     # MNIST's four files
    python recipes/dlrt_lenet.py --mnist FOLDER --full     # the paper's settings

The authors' results (their repository, MNIST, convolutions factored too): dense 98.82 %; tolerance
0.11 leaves 98.21 % with 93.0 % removed, 0.2 98.12 % with 97.0 %, 0.3 97.45 % with 97.8 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from images import Images, accuracy, digits, mnist, weights
from torch import nn

from lowrank.train import DLRT, TuckerDLRT

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep


def lenet() -> nn.Sequential:
    """430,500 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def train(images: Images, tolerance: float | None, seed: int, options: argparse.Namespace) -> Any:
    """A net and, at its end, its accuracy and size; tolerance None trains it dense."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    model: nn.Module = lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=options.momentum)
    controllers: list[Any] = []
    if tolerance is not None:
        shared = {"tolerance": tolerance, "every": options.every}
        linear = DLRT(model, optimizer, rank=options.rank, init="random", **shared)
        controllers = [linear, TuckerDLRT(model, optimizer, exclude_modules=["0"], **shared)]
    epochs, size = options.epochs, options.batch
    steps = epochs * (len(images.x) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    dense = weights(lenet())
    ranks: list[Any] = []
    for epoch in range(epochs):
        if epoch == min(round(options.settle * epochs), epochs - 1):
            ranks = [rank for controller in controllers for rank in controller.ranks.values()]
            for controller in controllers:
                model = controller.finish()
            controllers = []
        order = torch.randperm(len(images.x))
        for rows in order[: len(order) // size * size].split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.x[rows]), images.y[rows]).backward()
            for controller in controllers:
                controller.before_step()
            optimizer.step()
            for controller in controllers:
                controller.after_step()
            schedule.step()
        for controller in controllers:
            controller.end_epoch()
    return {
        "tolerance": tolerance, "seed": seed, "ranks": ranks,
        "accuracy": accuracy(model, images.test_x, images.test_y),
        "removed": 1 - weights(model) / dense, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mnist", help="folder with MNIST's idx files")
    parser.add_argument("--full", action="store_true", help="the paper's settings; hours")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.1, 0.15, 0.2, 0.3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--settle", type=float, default=0.6, help="share of epochs with changes")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rank", type=int, default=50, help="at the start")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.full:
        options.tolerances = [0.07, 0.09, 0.11, 0.13, 0.15, 0.17, 0.2, 0.3, 0.45]
        options.epochs, options.batch, options.lr, options.momentum = 20, 128, 0.05, 0.1
        options.seeds = 5
    images = mnist(options.mnist) if options.mnist else digits()
    print(f"{images.name}: {len(images.x)} images to train, {len(images.test_x)} to test")
    print(f"{'tolerance':>10}{'accuracy %':>21}{'below dense':>13}{'removed %':>11}  ranks, seed 0")
    base, rows = 0.0, []
    for tolerance in [None, *options.tolerances]:
        runs = [train(images, tolerance, seed, options) for seed in range(options.seeds)]
        rows += runs
        right = [100 * one["accuracy"] for one in runs]
        mean = statistics.fmean(right)
        base = mean if tolerance is None else base
        spread = f"{mean:.2f} ({min(right):.2f}–{max(right):.2f})"
        removed = statistics.fmean(100 * one["removed"] for one in runs)
        name = "dense" if tolerance is None else f"{tolerance:g}"
        ranks = runs[0]["ranks"] or ""
        print(f"{name:>10}{spread:>21}{base - mean:>13.2f}{removed:>11.1f}  {ranks}", flush=True)
    if options.write:
        keep("dlrt_lenet", rows, options.seeds - 1, settings=vars(options),
             gallery=shown(images, options.tolerances, rows))  # fmt: skip


def shown(images: Images, tolerances: list[float], rows: list[Any]) -> list[dict[str, Any]]:
    """The net has both controllers: each has the figures of the whole."""

    def mean(tolerance: float | None, key: str) -> float:
        return statistics.fmean(row[key] for row in rows if row["tolerance"] == tolerance)

    setting = f"weights of LeNet-5, with {{}} (dense {100 * mean(None, 'accuracy'):.1f})"
    return [
        figure(
            "controllers", name, images.name, setting.format(other), 1 - mean(tolerance, "removed"),
            "top-1, %", 100 * mean(tolerance, "accuracy"), mean(tolerance, "seconds"),
        )
        for name, other in (("DLRT", "TuckerDLRT"), ("TuckerDLRT", "DLRT"))
        for tolerance in tolerances
    ]  # fmt: skip


if __name__ == "__main__":
    main()
