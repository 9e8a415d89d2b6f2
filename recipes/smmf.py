"""SMMF beside other optimizers: the state they keep, and what it costs (arXiv 2412.08894).

LeNet-5 is trained on the digits of scikit-learn (or MNIST) by AdamW, Adafactor, SGD with momentum
and SMMF, each with the best of a few learning rates by its accuracy on a fifth of the training
images. State is counted from tensors, time is the median of a step. The paper promises up to 96 %
less memory than other memory-efficient optimizers keep.

    python recipes/smmf.py                       # minutes
    python recipes/smmf.py --mnist FOLDER --full    # MNIST's four files, more epochs and rates
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from images import Images, accuracy, digits, mnist
from torch import Tensor, nn

from lowrank.train import SMMF

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import keep

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "Adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=10 * lr),
    "SGD, momentum": lambda p, lr: torch.optim.SGD(p, lr=20 * lr, momentum=0.9),
    "SMMF": lambda p, lr: SMMF(p, lr=lr),
}


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    every = (t for state in optimizer.state.values() for t in state.values())
    return sum(t.numel() * t.element_size() for t in every if isinstance(t, Tensor) and t.ndim)


def train(
    images: Images, rows: Tensor, name: str, lr: float, seed: int, options: argparse.Namespace
) -> tuple[nn.Module, int, float]:
    """The net trained on these images; bytes of the state, and seconds of an optimizer's step."""
    torch.manual_seed(seed)
    model = lenet()
    optimizer = OPTIMIZERS[name](model.parameters(), lr)
    size, seconds = options.batch, []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    for _ in range(options.epochs):
        order = rows[torch.randperm(len(rows))]
        for batch in order[: len(order) // size * size].split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.x[batch]), images.y[batch]).backward()
            begun = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - begun)
        schedule.step()
    return model, state_bytes(optimizer), statistics.median(seconds)


def compare(images: Images, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The best rate by images held out of training, then all seeds at it, on the test images."""
    every = torch.arange(len(images.x))
    held = every.chunk(5)[0]
    right_of = {}
    for lr in options.rates:
        model, _, _ = train(images, every[len(held) :], name, lr, 0, options)
        right_of[lr] = 100 * accuracy(model, images.x[held], images.y[held])
    lr = max(right_of, key=lambda rate: right_of[rate])
    runs = [train(images, every, name, lr, seed, options) for seed in range(options.seeds)]
    return {
        "optimizer": name,
        "lr": given(name, lr),
        "chosen_by": {f"{given(name, rate):g}": right for rate, right in right_of.items()},
        "accuracy": [100 * accuracy(m, images.test_x, images.test_y) for m, _, _ in runs],
        "state_bytes": runs[0][1],
        "step_ms": 1000 * statistics.median(seconds for _, _, seconds in runs),
    }


def given(name: str, lr: float) -> float:
    """What the optimizer takes at this rate of the grid."""
    rate: float = OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))], lr).param_groups[0]["lr"]
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mnist", help="folder with MNIST's idx files")
    parser.add_argument("--full", action="store_true", help="more epochs and rates; hours")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 5e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # moments of dead units decay below what a CPU does fast
    if options.full:
        options.rates, options.epochs = [2e-4, *options.rates], 30
    images = mnist(options.mnist) if options.mnist else digits()
    print(f"{images.name}: {len(images.x)} images to train, {len(images.test_x)} to test")
    heads = f"{'rate':>8}{'accuracy %':>22}{'state, bytes':>14}{'to AdamW':>10}{'step, ms':>10}"
    print(" " * 15 + heads)
    rows: list[dict[str, Any]] = []
    for name in OPTIMIZERS:
        found = compare(images, name, options)
        size = found["state_bytes"] / (rows[0] if rows else found)["state_bytes"]
        right = found["accuracy"]
        spread = f"{statistics.fmean(right):.2f} ({min(right):.2f}–{max(right):.2f})"
        print(
            f"{name:15}{found['lr']:8.4f}{spread:>22}{found['state_bytes']:14,}{size:10.3f}"
            f"{found['step_ms']:10.2f}",
            flush=True,
        )
        rows.append(found)
    if options.write:
        keep("smmf", rows, options.seeds - 1, settings=vars(options), images=images.name)


if __name__ == "__main__":
    main()
