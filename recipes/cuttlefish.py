"""When to go from dense to factored: Cuttlefish, Pufferfish, and low rank from the start.

A net of four linear layers classifies the digits of scikit-learn (or MNIST), trained dense,
factored from the start at a tenth of the full ranks, factored by Pufferfish (arXiv 2103.03936) to
the same ranks after a warm-up, and by Cuttlefish (arXiv 2305.02538), which decides when and to
which ranks. Factored from the start are three: fresh random factors, the spectral initialisation
alone, and with Frobenius decay (arXiv 2105.01029), which all switching runs use too. InRank (arXiv
2306.11250) goes the other way: it begins at rank 2 with a buffer, and ranks grow with what training
explains. The first layer and the last one stay dense.

    python recipes/cuttlefish.py                       # minutes
    python recipes/cuttlefish.py --cifar               # and 2,000 images of CIFAR-10
    python recipes/cuttlefish.py --mnist FOLDER        # MNIST's four files
    python recipes/cuttlefish.py --mnist FOLDER --full    # Cuttlefish's own schedule, 300 epochs
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
from images import Images, accuracy, digits, mnist, weights
from torch import nn

import lowrank
from lowrank.train import Cuttlefish, FrobeniusDecay, InRank, Pufferfish

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep

PAPERS = """
on CIFAR-10, ResNet-18, as the repositories report: Pufferfish dense 95.09 %, low rank 93.75 %,
with its first layers dense 93.92 %, with a dense warm-up too 94.87 %; Cuttlefish 94.66 %.
On CIFAR-10, ResNet-32 at a tenth of the parameters (arXiv 2105.01029): neither 93.59 %, spectral
initialisation alone 92.52 %, Frobenius decay alone 92.92 %, both 94.34 %, dense 94.49 %.
InRank: GPT-2 with at most 33 % of the full ranks (arXiv 2306.11250)."""
MIDDLE = ["3", "5"]  # the layers that are factored
CONTROLLED = {
    "spectral + decay": "FrobeniusDecay", "Pufferfish": "Pufferfish", "Cuttlefish": "Cuttlefish",
    "InRank": "InRank",
}  # fmt: skip
WAYS = ("dense", "random", "spectral", *CONTROLLED)


def net(images: Images) -> nn.Sequential:
    inputs, width = images.x[0].numel(), 256
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip


def start(images: Images, way: str, seed: int, options: argparse.Namespace) -> nn.Module:
    """The net as it is trained first: dense, or at a share of the full ranks."""
    model: nn.Module = net(images)
    if way in ("random", "spectral", "spectral + decay"):
        init: Any = "random" if way == "random" else "spectral"
        # r (m + n) of m·n numbers, square layers: a share s of the ranks keeps 2s
        lowrank.factorize_by_design(
            model, 2 * options.share, init, target_modules=MIDDLE, seed=seed, align=1
        )
    return model


def controller_of(way: str, model: nn.Module, optimizer: Any, options: argparse.Namespace) -> Any:
    """What switches or decays; None where the optimizer alone does."""
    chosen = {"target_modules": MIDDLE}
    if way == "spectral + decay":
        return FrobeniusDecay(model, optimizer, strength=options.decay, **chosen)
    if way == "Pufferfish":
        return Pufferfish(
            model, optimizer, epochs=options.epochs // 4, share=options.share,
            frobenius_decay=options.decay, **chosen,
        )  # fmt: skip
    if way == "Cuttlefish":
        return Cuttlefish(
            model, optimizer, min_epochs=options.min_epochs, window=options.window,
            smooth=options.smooth, tolerance=options.tolerance, max_epochs=options.epochs // 2,
            frobenius_decay=options.decay, **chosen,
        )  # fmt: skip
    if way == "InRank":
        return InRank(model, optimizer, buffer=options.buffer, share=options.explained, **chosen)
    return None


def train(images: Images, way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = start(images, way, seed, options)
    ours = way in ("spectral + decay", "Pufferfish", "Cuttlefish")
    inside = [p for n, p in model.named_parameters() if n.partition(".")[0] in MIDDLE]
    known = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in known]
    groups = [
        {"params": inside, "weight_decay": 0.0 if ours else options.decay},
        {"params": rest, "weight_decay": options.decay},
    ]
    optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=0.9)
    controller = controller_of(way, model, optimizer, options)
    size = options.batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    for _ in range(options.epochs):
        order = torch.randperm(len(images.x))
        for rows in order[: len(order) // size * size].split(size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.x[rows]), images.y[rows]).backward()
            if controller:
                controller.before_step()
            optimizer.step()
            if controller:
                controller.after_step()
        schedule.step()
        if controller:
            controller.end_epoch()
    model = controller.finish() if controller else model
    return {
        "accuracy": 100 * accuracy(model, images.test_x, images.test_y),
        "kept": 100 * weights(model) / weights(net(images)),
        "switched": controller.switched if way in ("Pufferfish", "Cuttlefish") else None,
        "ranks": [m.rank for m in model.modules() if isinstance(m, lowrank.nn.LowRankLinear)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mnist", help="folder with MNIST's idx files")
    parser.add_argument("--cifar", action="store_true", help="on LOWRANK_ASSETS/cifar10 too")
    parser.add_argument("--full", action="store_true", help="Cuttlefish's own schedule; hours")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--decay", type=float, default=1e-3)
    parser.add_argument("--share", type=float, default=0.1, help="of the full rank")
    parser.add_argument("--tolerance", type=float, default=1.0, help="ranks an epoch")
    parser.add_argument("--min-epochs", type=int, default=5)
    parser.add_argument("--window", type=int, default=3)
    parser.add_argument("--smooth", type=int, default=3)
    parser.add_argument("--buffer", type=int, default=20, help="of InRank, beyond its rank")
    parser.add_argument("--explained", type=float, default=0.9, help="InRank's share of variance")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.full:
        options.epochs, options.batch, options.seeds, options.tolerance = 300, 128, 3, 0.1
        options.min_epochs, options.window, options.smooth = 15, 10, 15
    beds = [mnist(options.mnist) if options.mnist else digits(8)]
    if options.cifar:
        from tucker_dlrt_cifar import cifar

        beds.append(cifar(Path(os.environ["LOWRANK_ASSETS"]) / "cifar10"))
    rows = [row for images in beds for row in compared(images, options)]
    print(PAPERS)
    if options.write:
        keep("cuttlefish", rows, options.seeds - 1, settings=vars(options), papers=PAPERS.strip(),
             gallery=[one for images in beds for one in shown(images.name, rows)])  # fmt: skip


def compared(images: Images, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a way and seed."""
    print(f"{images.name}: {len(images.x)} images to train, {len(images.test_x)} to test")
    print(f"{'':18}{'accuracy %':>22}{'weights %':>11}  switched after  ranks, seed 0")
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        started = time.perf_counter()
        runs = [train(images, way, seed, options) for seed in range(options.seeds)]
        took = (time.perf_counter() - started) / options.seeds
        rows += [
            {"bed": images.name, "way": way, "seed": seed, "seconds": took, **one}
            for seed, one in enumerate(runs)
        ]
        right = [one["accuracy"] for one in runs]
        spread = f"{statistics.fmean(right):.2f} ({min(right):.2f}–{max(right):.2f})"
        kept = statistics.fmean(one["kept"] for one in runs)
        when = runs[0]["switched"] or ""
        ranks = runs[0]["ranks"] or ""
        print(f"{way:18}{spread:>22}{kept:11.1f}  {when:<14}  {ranks}", flush=True)
    return rows


def shown(bed: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of the controllers, with those of the dense net and of fresh factors beside them."""

    def mean(way: str, key: str) -> float:
        return statistics.fmean(row[key] for row in rows if (row["bed"], row["way"]) == (bed, way))

    beside = (
        f"dense {mean('dense', 'accuracy'):.1f}, fresh factors {mean('random', 'accuracy'):.1f}"
    )
    return [
        figure(
            "controllers", name, bed, f"weights of the net ({beside})",
            mean(way, "kept") / 100, "top-1, %", mean(way, "accuracy"), mean(way, "seconds"),
        )
        for way, name in CONTROLLED.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
