"""CondLR: does a bounded condition number make a low-rank net robust (arXiv 2306.01485)?

The same net is trained dense, with factors that know no bound (the plain product of two layers),
and by CondLR at two bounds; then every one is attacked by the fast gradient sign method: each
pixel moves by ε in the direction that raises the loss.

    python recipes/condlr_robustness.py                    # the digits of scikit-learn, minutes
    python recipes/condlr_robustness.py --mnist FOLDER     # MNIST's four files
    python recipes/condlr_robustness.py --mnist FOLDER --full     # the paper's length

What was published for VGG16 on CIFAR-10 at ε = 0 / .002 / .004 / .006 (arXiv 2505.08022, table 4,
another attack): dense 89.83 / 78.61 / 64.66 / 53.71, CondLR with half of the parameters
89.97 / 72.25 / 60.19 / 50.17, an SVD of the trained net with a fifth 87.99 / 63.57 / 42.06 / 29.27.
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
from torch import Tensor, nn

from lowrank.nn import LowRankLinear
from lowrank.train import CondLR

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep

WIDTH = 256


def net(pixels: int) -> nn.Sequential:
    """Three hidden layers of equal width; the first and the last layer stay dense."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(),
        nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10),
    )  # fmt: skip


INNER = ["3", "5"]  # the two layers that are made low-rank


def attacked(model: nn.Module, x: Tensor, y: Tensor, size: float) -> Tensor:
    """x + ε sign(∂L/∂x)."""
    moved = x.clone().requires_grad_()
    nn.functional.cross_entropy(model(moved), y).backward()
    assert moved.grad is not None
    return (x + size * moved.grad.sign()).detach()


def train(way: str, images: Images, seed: int, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = net(images.x[0].numel())
    if way == "low-rank":
        for name in INNER:
            dense = model.get_submodule(name)
            u, s, v = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
            half = s[: options.rank].sqrt()
            down, up = half[:, None] * v[: options.rank], u[:, : options.rank] * half
            model.register_module(name, LowRankLinear.from_factors(down, up, dense.bias))
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=options.momentum)
    controller = None
    if way.startswith("CondLR"):
        tau = float(way.split()[-1])
        controller = CondLR(model, optimizer, tau=tau, rank=options.rank, target_modules=INNER)
    size = options.batch
    steps = options.epochs * (len(images.x) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(options.epochs):
        order = torch.randperm(len(images.x))
        for rows in order[: len(order) // size * size].split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.x[rows]), images.y[rows]).backward()
            if controller is not None:
                controller.before_step()
            optimizer.step()
            if controller is not None:
                controller.after_step()
            schedule.step()
    return model if controller is None else controller.finish()


def condition(model: nn.Module, rank: int) -> float:
    """The largest condition number of the inner layers, of their leading `rank` values."""
    layers = [model.get_submodule(name) for name in INNER]
    values = [torch.linalg.svdvals(torch.as_tensor(layer.weight.detach())) for layer in layers]
    full = len(values[0]) if isinstance(layers[0], nn.Linear) else rank
    return max(float(v[0] / v[full - 1]) for v in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mnist", help="folder with MNIST's idx files")
    parser.add_argument("--full", action="store_true", help="the paper's 120 epochs, five seeds")
    parser.add_argument("--taus", type=float, nargs="+", default=[1.1, 1.5])
    parser.add_argument("--attacks", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3])
    parser.add_argument("--rank", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    if options.full:
        options.epochs, options.seeds, options.batch, options.lr = 120, 5, 128, 0.1
    torch.set_num_threads(options.threads)
    images = mnist(options.mnist) if options.mnist else digits(side=8)
    print(f"{images.name}: {len(images.x)} images to train, {len(images.test_x)} to test")
    heads = "".join(f"{f'ε = {size:g}':>18}" for size in options.attacks)
    print(f"{'way':14}{'weights':>9}{'condition':>11}{heads}   accuracy %, mean (least–most)")
    ways = ["dense", "low-rank", *(f"CondLR τ = {tau:g}" for tau in options.taus)]
    rows: list[dict[str, Any]] = []
    for way in ways:
        started = time.perf_counter()
        models: list[Any] = [train(way, images, seed, options) for seed in range(options.seeds)]
        took = (time.perf_counter() - started) / options.seeds
        cells = ""
        for size in options.attacks:
            right = [
                100 * accuracy(m, attacked(m, images.test_x, images.test_y, size), images.test_y)
                for m in models
            ]
            cells += f"{f'{statistics.fmean(right):.2f} ({min(right):.1f}–{max(right):.1f})':>18}"
            rows.append({"way": way, "size": size, "accuracy": right, "seconds": took,
                         "weights": weights(models[0])})  # fmt: skip
        worst = max(condition(model, options.rank) for model in models)
        print(f"{way:14}{weights(models[0]):>9,}{worst:>11.3g}{cells}", flush=True)
        rows[-1]["condition"] = worst
    if options.write:
        keep("condlr_robustness", rows, options.seeds - 1, settings=vars(options),
             gallery=shown(images, rows))  # fmt: skip


def shown(images: Images, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of CondLR, with those of the dense net and of plain factors in their settings."""
    other = {(row["way"], row["size"]): statistics.fmean(row["accuracy"]) for row in rows}
    dense = rows[0]["weights"]
    return [
        figure(
            "controllers", "CondLR", images.name,
            f"weights, {row['way'].partition(' ')[2]}, attack {row['size']:g} (dense "
            f"{other['dense', row['size']]:.1f}, low rank without a bound "
            f"{other['low-rank', row['size']]:.1f})",
            row["weights"] / dense, "top-1, %", statistics.fmean(row["accuracy"]), row["seconds"],
        )
        for row in rows if row["way"].startswith("CondLR")
    ]  # fmt: skip


if __name__ == "__main__":
    main()
