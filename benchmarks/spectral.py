"""Does sparsification that preserves the spectrum prune better than magnitude?

    python benchmarks/spectral.py

"Neural Network Pruning as Spectrum Preserving Process" (arXiv 2307.08982) claims a better pruning
result for a sparsification that keeps large entries and draws from smaller ones. Three beds: random
matrices; the layers of the embedded model, and its KL; a net on scikit-learn's digits, with and
without training of what was kept. At equal numbers; masks are not counted.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import keep
from torch import Tensor, nn

from lowrank import linalg
from lowrank.demo import held_out_rows, judge, tiny_lm
from lowrank.methods import SpectralMasked
from lowrank.types import Cost, Option, Statistics

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from images import accuracy, digits

TOP = 8
BEDS = ("embedded", "digits", "matrices")


def pruned(certain: float) -> Callable[[Tensor, float, int], Tensor]:
    """This share of what is kept are the largest entries, the others are drawn."""

    def prune(weight: Tensor, share: float, seed: int = 0) -> Tensor:
        count = max(round(share * weight.numel()), 1)
        return weight * linalg.drawn(count, certain, seed)(weight.abs())

    return prune


def at_random(weight: Tensor, share: float, seed: int = 0) -> Tensor:
    return weight * (pruned(0.0)(torch.ones_like(weight), share, seed) != 0)


WAYS: dict[str, Callable[..., Tensor]] = {
    "largest": pruned(1.0),
    "10 % drawn": pruned(0.9),
    "50 % drawn": pruned(0.5),
    "all drawn": pruned(0.0),
    "random": at_random,
}


def distances(weight: Tensor, other: Tensor) -> list[float]:
    w, s = weight.double(), other.double()
    return [
        linalg.spectral_error(w, s), linalg.spectrum_error(w, s),
        linalg.subspace_angle(w, s, TOP), float((w - s).norm() / w.norm()),
    ]  # fmt: skip


def matrices(draws: int = 5, side: int = 256) -> list[dict[str, Any]]:
    """Normal entries, without and with eight directions that stand out, and Student's t."""
    rows = []
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    for kind in ("normal", "spiked", "t, 3 degrees"):
        every = []
        for _ in range(draws):
            weight = normal(side, side)
            if kind == "spiked":
                bases = [torch.linalg.qr(normal(side, TOP)).Q for _ in range(2)]
                weight += 3.6 * side**0.5 * bases[0] @ bases[1].T
            elif kind != "normal":
                weight /= normal(3, side, side).square().mean(0).sqrt()
            every.append(weight)
        for share in (0.3, 0.1):
            for way, made in WAYS.items():
                found = [linalg.spectral_error(w, made(w, share)) for w in every]
                rows.append({"kind": kind, "share": share, "way": way, "spectral": found})
                print(
                    f"{kind:13} {share:.1f} {way:12} {sum(found) / draws:.3f} "
                    f"({min(found):.3f} to {max(found):.3f})"
                )
    return rows


def nearest(layer: nn.Linear, share: float) -> Tensor:
    """`spectral-masked` of rank 2 % of the smaller side, in as many numbers."""
    outs, ins = layer.weight.shape
    rank = max(round(0.02 * min(outs, ins)), 1)
    size = (rank, round(share * outs * ins) - rank * (outs + ins))
    option = Option("spectral-masked", size, "lowrank-masked", Cost(0, 0, 0), 0.0)
    new: Any = SpectralMasked(iterations=40).factor(layer, option, Statistics())
    return new.dense_weight()


def low_rank(layer: nn.Linear, share: float) -> Tensor:
    up, down = linalg.factor(
        layer.weight, max(int(share * layer.weight.numel() / sum(layer.weight.shape)), 1)
    )
    return up @ down


def language(shares: tuple[float, ...]) -> list[dict[str, Any]]:
    """Mean distances of the embedded model's layers, and the KL of the whole."""
    tiny = tiny_lm()
    judged = held_out_rows(tiny)[-8:]
    dense = {n: m for n, m in tiny.model.model.named_modules() if isinstance(m, nn.Linear)}
    models, rows = [tiny.model], []
    for share in shares:
        made: dict[str, Callable[..., Tensor]] = {
            way: lambda layer, seed, way=way: WAYS[way](layer.weight.detach(), share, seed)  # noqa: B023
            for way in ("largest", "10 % drawn", "50 % drawn", "random")
        }
        made["svd"] = lambda layer, _: low_rank(layer, share)  # noqa: B023
        made["spectral-masked"] = lambda layer, _: nearest(layer, share)  # noqa: B023
        for way, make in made.items():
            model, mean = copy.deepcopy(tiny.model), torch.zeros(4, dtype=torch.float64)
            for index, (name, layer) in enumerate(dense.items()):
                new = make(layer, index).detach().to(layer.weight)
                mean += torch.tensor(distances(layer.weight.detach(), new)) / len(dense)
                model.model.get_submodule(name).weight.data = new
            models.append(model)
            rows.append({"share": share, "way": way, "distances": mean.tolist()})
    for row, (_, kl) in zip(rows, judge(models, judged)[1:], strict=True):
        row["kl"] = kl
        spectral, values, angle, error = row["distances"]
        print(
            f"{row['share']:.1f} {row['way']:20} spectral {spectral:.3f} values {values:.3f} "
            f"angle {angle:4.1f} error {error:.3f} KL {kl:.3f}",
            flush=True,
        )
    return rows


def trained(steps: int, model: nn.Module, images: Any, seed: int, rate: float = 0.1) -> None:
    """Plain training; zeros of the weights stay zeros if there are any."""
    masks = {p: p.detach() != 0 for p in model.parameters() if p.ndim > 1}
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(images.x), (64,), generator=rng)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images.x[batch]), images.y[batch]).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for weight, mask in masks.items():
                weight.mul_(mask)


def of_digits(shares: tuple[float, ...], seeds: int) -> list[dict[str, Any]]:
    images, rows = digits(8), []
    for seed in range(seeds):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
            nn.Linear(100, 10),
        )  # fmt: skip
        trained(600, net, images, seed)
        rows.append(_row("dense", 1.0, seed, net, net, images))
        for share in shares:
            for way, prune in WAYS.items():
                small = copy.deepcopy(net)
                for layer in small:
                    if isinstance(layer, nn.Linear):
                        layer.weight.data = prune(layer.weight.data, share, seed=seed)
                tuned = copy.deepcopy(small)
                trained(200, tuned, images, seed + 100, rate=0.05)
                rows.append(_row(way, share, seed, small, tuned, images))
    for share, way in dict.fromkeys((row["share"], row["way"]) for row in rows):
        every = [row for row in rows if (row["share"], row["way"]) == (share, way)]
        means = [sum(row[key] for row in every) / len(every) for key in ("pruned", "tuned")]
        print(f"digits {share:.2f} {way:12} {means[0]:.3f} {means[1]:.3f}")
    return rows


def _row(
    way: str, share: float, seed: int, small: nn.Module, tuned: nn.Module, images: Any
) -> dict[str, Any]:
    scores = [accuracy(each, images.test_x, images.test_y) for each in (small, tuned)]
    return {"way": way, "share": share, "seed": seed, "pruned": scores[0], "tuned": scores[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--beds", nargs="+", choices=BEDS, default=BEDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made: dict[str, Callable[[], Any]] = {
        "embedded": lambda: language((0.5, 0.3)),
        "digits": lambda: of_digits((0.2, 0.1, 0.05), arguments.seeds),
        "matrices": matrices,
    }
    for bed in arguments.beds:
        keep(f"spectral_{bed}", made[bed]())


if __name__ == "__main__":
    main()
