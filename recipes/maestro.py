"""Maestro: components ordered by importance, and ranks that follow (arXiv 2308.14929).

First the paper's theorem on a linear map: trained by ordered dropout, every truncation of the
factors is the best one of its rank, and importances are singular values. Then a classifier of the
digits of scikit-learn: accuracy and size for several strengths of the lasso, and what is left when
every layer keeps only half of the components it ended with, without any further training; beside
it the dense net cut to the same ranks by the SVD of its weights.

    python recipes/maestro.py                       # minutes
    python recipes/maestro.py --mnist FOLDER        # MNIST's four files
    python recipes/maestro.py --mnist FOLDER --full    # the authors' optimizer, long runs; hours

The authors' results are for VGG, ResNet and transformers; no table of theirs is for these nets.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from images import Images, accuracy, digits, mnist, weights
from torch import nn

import lowrank
from lowrank.nn import LowRankLinear
from lowrank.train import Maestro

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep

HEADS = ("accuracy %", "weights %", "dense, cut", "half of it", "dense, half", "ranks, seed 0")


def linear_map(steps: int = 1500) -> None:
    """A map (8, 6) of rank 5, learnt from scratch; one row a rank."""
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(n, 5, generator=generator, dtype=torch.float64)).Q
        for n in (8, 6)
    )
    values = torch.tensor([5, 3.5, 2.2, 1.2, 0.6], dtype=torch.float64)
    target = u @ torch.diag(values) @ v.T
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    controller = Maestro(model, optimizer, lasso=0.0)
    eye = torch.eye(6, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (model(eye) - target.T).square().sum()).backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
    sizes = controller.importances["0"]
    layer: Any = model[0]
    print(f"a linear map, {steps} steps")
    print(f"{'rank':>6}{'error':>12}{'of the SVD':>12}{'importance':>12}{'singular value':>16}")
    for rank in range(1, 6):
        cut = layer.up.weight[:, :rank] @ layer.down.weight[:rank]
        error, best = float((target - cut.detach()).norm()), float(values[rank:].norm())
        print(f"{rank:6}{error:12.6f}{best:12.6f}{sizes[rank - 1]:12.4f}{values[rank - 1]:16.4f}")


def net(images: Images) -> nn.Sequential:
    inputs = images.x[0].numel()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def train(images: Images, lasso: float | None, seed: int, options: argparse.Namespace) -> nn.Module:
    """A trained net; lasso None trains it dense."""
    torch.manual_seed(seed)
    model: nn.Module = net(images)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=0.9, weight_decay=options.decay
    )
    controllers = []
    if lasso is not None:
        controllers.append(
            Maestro(model, optimizer, lasso=lasso, threshold=options.threshold, seed=seed)
        )
    size = options.batch
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [options.epochs // 2, options.epochs * 3 // 4], 0.1
    )
    for _ in range(options.epochs):
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
    for controller in controllers:
        model = controller.finish()
    return model.eval()


def ranks(model: nn.Module) -> dict[str, int]:
    return {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)}


@torch.no_grad()
def halved(model: nn.Module) -> nn.Module:
    """Every factored layer with the first half of its components."""
    model = copy.deepcopy(model)
    for name in ranks(model):
        layer: Any = model.get_submodule(name)
        half = max(layer.rank // 2, 1)
        layer.down.weight[half:] = 0
    return model


def cut(dense: nn.Module, sizes: dict[str, int]) -> nn.Module:
    """The dense net with the best approximations of these ranks."""
    done: Any = lowrank.compress(
        dense, rank_pattern=sizes, target_modules="all", data=None, copy=True, progress=False
    )
    return done[0]  # type: ignore[no-any-return]


def row(images: Images, models: list[nn.Module], dense: list[nn.Module]) -> dict[str, Any]:
    """Means over the seeds, by the heads of the table."""

    def mean(every: list[nn.Module]) -> float:
        return statistics.fmean(100 * accuracy(m, images.test_x, images.test_y) for m in every)

    kept = statistics.fmean(weights(m) / weights(dense[0]) for m in models)
    cells: list[Any] = [mean(models), 100 * kept]
    if all(ranks(m) for m in models):
        sizes = [ranks(m) for m in models]
        half = [{n: max(r // 2, 1) for n, r in each.items()} for each in sizes]
        cells.append(mean([cut(d, s) for d, s in zip(dense, sizes, strict=True)]))
        cells.append(mean([halved(m) for m in models]))
        cells.append(mean([cut(d, s) for d, s in zip(dense, half, strict=True)]))
        cells.append(list(sizes[0].values()))
    return dict(zip(HEADS, cells, strict=False))


def line(found: dict[str, Any]) -> str:
    """A row as it is printed."""
    formats = (".2f", ".1f", ".2f", ".2f", ".2f", "")
    cells = [format(v, f) if f else str(v) for v, f in zip(found.values(), formats, strict=False)]
    return "".join(f"{cell:>14}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mnist", help="folder with MNIST's idx files")
    parser.add_argument("--full", action="store_true", help="long runs; hours")
    parser.add_argument("--lassos", type=float, nargs="+", default=[1e-4, 1e-3, 3e-3, 1e-2])
    parser.add_argument("--threshold", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--decay", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.full:
        options.epochs, options.batch, options.lr, options.seeds = 300, 128, 0.01, 5
    linear_map()
    images = mnist(options.mnist) if options.mnist else digits(8)
    print(f"\n{images.name}: {len(images.x)} images to train, {len(images.test_x)} to test")
    print(f"{'lasso':>8}" + "".join(f"{head:>14}" for head in HEADS))
    dense = [train(images, None, seed, options) for seed in range(options.seeds)]
    first = row(images, dense, dense)
    rows: list[dict[str, Any]] = [{"lasso": None, **first}]
    print(f"{'dense':>8}{line(first)}", flush=True)
    for lasso in options.lassos:
        started = time.perf_counter()
        models = [train(images, lasso, seed, options) for seed in range(options.seeds)]
        took = (time.perf_counter() - started) / options.seeds
        found = row(images, models, dense)
        rows.append({"lasso": lasso, **found, "seconds": took})
        print(f"{lasso:>8g}{line(found)}", flush=True)
    if options.write:
        keep("maestro", rows, options.seeds - 1, settings=vars(options),
             gallery=shown(images, rows))  # fmt: skip


def shown(images: Images, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of Maestro, with the dense net's and those of the dense net cut to its ranks."""
    dense, *ours = rows
    return [
        figure(
            "controllers", "Maestro", images.name,
            f"weights, lasso {one['lasso']:g} (dense {dense['accuracy %']:.1f}"
            + (f", cut to the same ranks {one['dense, cut']:.1f})" if "dense, cut" in one else ")"),
            one["weights %"] / 100, "top-1, %", one["accuracy %"], one["seconds"],
        )
        for one in ours
    ]  # fmt: skip


if __name__ == "__main__":
    main()
