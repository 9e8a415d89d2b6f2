"""DSL on the digits of scikit-learn: is a sparse net that moves better than one that does not?

Dynamic Sparse Learning (arXiv 2402.02855, of recommenders) trains sparse from the start, at a fixed
budget, and claims results comparable to dense ones. Here a net 64 – 300 – 100 – 10 is trained for
the same steps in every way, and stored in the same numbers: with entries that move (DSL), with
those that were largest at the start, and with those that are largest after half of the steps, dense
until then.

    python recipes/dynamic_sparse.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from images import Images, accuracy, digits
from torch import nn

from lowrank.nn import LowRankMaskedLinear
from lowrank.train import DSL

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep

RATIOS = (0.2, 0.1, 0.05)
STILL = 0.75  # share of the steps after which entries rest


def net(seed: int) -> nn.Sequential:
    """50,200 weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
        nn.Linear(100, 10),
    )  # fmt: skip


def train(
    model: nn.Module,
    images: Images,
    seed: int,
    steps: int,
    build: Callable[..., Any] | None,
    at: int,
) -> nn.Module:
    """SGD with a cosine; `build` makes a controller at the step `at`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(seed)
    controller = None
    for step in range(steps):
        if build is not None and step == at:
            controller = build(model, optimizer)
        batch = torch.randint(len(images.x), (64,), generator=rng)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.x[batch]), images.y[batch]).backward()
        if controller is not None:
            controller.before_step()
        optimizer.step()
        if controller is not None:
            controller.after_step()
        schedule.step()
    return model if controller is None else controller.finish()


def ways(ratio: float, steps: int) -> dict[str, tuple[Callable[..., Any] | None, int]]:
    """What a controller does, and the step at which it begins."""

    def sparse(moves: int) -> Callable[..., Any]:
        return lambda m, o: DSL(m, o, ratio=ratio, steps=moves, target_modules="all")

    return {
        "DSL": (sparse(round(STILL * steps)), 0),
        "entries of the start": (sparse(1), 0),
        "pruned after half": (sparse(1), steps // 2),
    }


def stored(model: nn.Sequential) -> int:
    """Numbers in weights; biases are not counted."""
    sparse = [m.cost().params for m in model if isinstance(m, LowRankMaskedLinear)]
    return sum(sparse) + sum(m.weight.numel() for m in model if isinstance(m, nn.Linear))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = digits(8)
    rows: dict[tuple[float, str], list[tuple[float, int]]] = {}
    for seed in range(options.seeds):
        for ratio in (1.0, *RATIOS):
            chosen = ways(ratio, options.steps) if ratio < 1 else {"dense": (None, 0)}
            for way, (build, at) in chosen.items():
                model = net(seed)
                model = train(model, images, seed, options.steps, build, at)
                found = accuracy(model, images.test_x, images.test_y), stored(model)
                rows.setdefault((ratio, way), []).append(found)
    for (ratio, way), every in rows.items():
        scores = [score for score, _ in every]
        numbers = statistics.mean(count for _, count in every)
        print(
            f"{ratio:4.2f} {way:21} {numbers:7.0f} numbers  {statistics.mean(scores):.3f} "
            f"({min(scores):.3f} to {max(scores):.3f})"
        )
    if options.write:
        found = [
            {"ratio": ratio, "way": way, "seed": seed, "accuracy": score, "numbers": count}
            for (ratio, way), every in rows.items() for seed, (score, count) in enumerate(every)
        ]  # fmt: skip
        keep("dynamic_sparse", found, options.seeds - 1, settings=vars(options),
             gallery=shown(images, rows))  # fmt: skip


def shown(
    images: Images, rows: dict[tuple[float, str], list[tuple[float, int]]]
) -> list[dict[str, Any]]:
    """Figures of DSL, with those of the other ways at its size in their settings."""
    mean = {key: 100 * statistics.fmean(score for score, _ in every) for key, every in rows.items()}
    return [
        figure(
            "controllers", "DSL", images.name,
            f"weights of the net (dense {mean[1.0, 'dense']:.1f}, entries of the start "
            f"{mean[ratio, 'entries of the start']:.1f}, pruned after half "
            f"{mean[ratio, 'pruned after half']:.1f})",
            ratio, "top-1, %", mean[ratio, "DSL"],
        )
        for ratio in RATIOS
    ]  # fmt: skip


if __name__ == "__main__":
    main()
