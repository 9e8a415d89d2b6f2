"""Factored from the start: a small CNN on scikit-learn's digits, beside the dense one.

    python recipes/factorize_by_design.py [--keep 0.3] [--epochs 12] [--seeds 3] [--cifar]

Every convolution but the first keeps a share of its weights; the last layer is left dense;
equal steps, rates and batches. Starts: fresh factors, or the SVD of the fresh dense weights
(spectral; Khodak et al., arXiv 2105.01029); penalties: weight decay of the factors, or Frobenius
decay of their product (same paper, which finds that the two belong together: ResNet-32x2 on
CIFAR-10 at 10 % of the parameters 93.59 % plainly, 94.34 % with both, 94.49 % dense).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from images import Images, accuracy, digits
from torch import nn

import lowrank
from lowrank.nn import is_factored

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep

WAYS = {  # start, penalty
    "dense": (None, "weights"),
    "random": ("random", "weights"),
    "spectral": ("spectral", "weights"),
    "random + Frobenius": ("random", "product"),
    "spectral + Frobenius": ("spectral", "product"),
}
STRENGTH = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cifar", action="store_true", help="on LOWRANK_ASSETS/cifar10 too")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    beds = [digits(side=16)]
    if args.cifar:
        from tucker_dlrt_cifar import cifar

        beds.append(cifar(Path(os.environ["LOWRANK_ASSETS"]) / "cifar10"))
    rows = [row for bed in beds for row in compared(bed, args)]
    if args.write:
        keep("factorize_by_design", rows, args.seeds - 1, settings=vars(args),
             gallery=[one for bed in beds for one in shown(bed.name, rows)])  # fmt: skip


def compared(data: Images, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a way."""
    print(f"{data.name}: {len(data.x)} for training, {len(data.test_x)} for the test")
    print(f"{'way':22} {'params':>8}  top-1 of each seed")
    rows: list[dict[str, Any]] = []
    for name, (start, penalty) in WAYS.items():
        started = time.perf_counter()
        accuracies, size = [], 0
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            model: nn.Module = network(data.x.shape[1])
            if start is not None:
                model, _ = lowrank.factorize_by_design(
                    model, args.keep, start, exclude_modules=["0", "13"], seed=seed
                )
            size = sum(p.numel() for p in model.parameters())
            accuracies.append(100 * trained(model, data, penalty, args.epochs, seed))
        each = " ".join(f"{x:6.2f}" for x in accuracies)
        print(f"{name:22} {size:8,}  {each}   mean {statistics.fmean(accuracies):.2f}", flush=True)
        took = (time.perf_counter() - started) / args.seeds
        rows.append({"bed": data.name, "way": name, "params": size, "accuracy": accuracies,
                     "seconds": took})  # fmt: skip
    return rows


def shown(bed: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of Frobenius decay from both starts, beside weight decay and the dense net."""
    by = {row["way"]: row for row in rows if row["bed"] == bed}
    mean = {way: statistics.fmean(row["accuracy"]) for way, row in by.items()}
    return [
        figure(
            "controllers", "FrobeniusDecay", bed,
            f"parameters of a CNN, {start} start (weight decay {mean[start]:.1f}, dense "
            f"{mean['dense']:.1f})",
            by[way]["params"] / by["dense"]["params"], "top-1, %", mean[way], by[way]["seconds"],
        )
        for start in ("random", "spectral")
        for way in (f"{start} + Frobenius",)
    ]  # fmt: skip


def network(channels: int) -> nn.Sequential:
    """Four convolutions with batch norm, images (B, channels, side, side)."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((channels, 32, 1), (32, 48, 2), (48, 48, 1), (48, 64, 2)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]  # fmt: skip
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers[:12], pool, nn.Linear(64, 10))


def trained(model: nn.Module, data: Images, penalty: str, epochs: int, seed: int) -> float:
    """Share of test images that are right at the end."""
    steps = epochs * -(-len(data.x) // 64)
    factors = {id(p) for m in model.modules() if is_factored(m) for p in m.parameters()}
    groups: dict[float, list[nn.Parameter]] = {0.0: [], STRENGTH: []}
    for p in model.parameters():
        spared = p.ndim == 1 or (penalty == "product" and id(p) in factors)
        groups[0.0 if spared else STRENGTH].append(p)
    optimizer = torch.optim.SGD(
        [{"params": some, "weight_decay": decay} for decay, some in groups.items()],
        lr=0.05, momentum=0.9,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    controller: Any = None
    if penalty == "product":
        controller = lowrank.train.FrobeniusDecay(model, optimizer, strength=STRENGTH)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x), generator=generator).split(64):
            loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
            loss.backward()
            if controller is not None:
                controller.before_step()
            optimizer.step()
            if controller is not None:
                controller.after_step()
            schedule.step()
            optimizer.zero_grad()
    if controller is not None:
        controller.finish()
    return accuracy(model, data.test_x, data.test_y)


if __name__ == "__main__":
    main()
