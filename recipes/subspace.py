"""A network as a seed and a short vector: how few random directions learn the digits?

A net of 64 – 64 – 10 (4,810 parameters) is trained on scikit-learn's digits: whole, in random
subspaces of rising dimension (arXiv 1804.08838), and as PRANC (arXiv 2206.08464), whose file holds
a vector and no weights. Beside PRANC stand nets with fewer hidden units, which store as many
numbers in another way. Scores are accuracies on a fifth of the training images, by which learning
rates are chosen too; the last column of the second table is of the test images.

    python recipes/subspace.py                        # less than a minute
    python recipes/subspace.py --seeds 1 --steps 200  # less

Li et al. call d₉₀ the dimension at which 90 % of the full accuracy is reached. PRANC's abstract
claims about a hundredth of the numbers at better accuracy than other methods of that size; theirs
are of networks for images in colour, and none is compared here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from images import accuracy, digits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from lowrank.train import Subspace, intrinsic_dimension

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep

BATCH = 64


def net(seed: int = 0, width: int = 64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[25, 50, 100, 200, 400])
    parser.add_argument("--bisections", type=int, default=2)
    parser.add_argument("--vectors", type=int, nargs="+", default=[100, 200, 400, 800])
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--projection", default="dense", choices=["dense", "sparse", "fastfood"])
    parser.add_argument("--said", action="store_true", help="train a scale of each tensor")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = digits(8)
    fifth, seeds = len(images.x) // 5, range(options.seeds)
    held, x, y = (images.x[:fifth], images.y[:fifth]), images.x[fifth:], images.y[fifth:]

    def loss(model: nn.Module, step: int) -> Tensor:
        rows = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        return nn.functional.cross_entropy(model(x[rows]), y[rows])

    print(f"{images.name}: {len(x)} to train, {fifth} held out, {len(images.test_x)} to test")
    found = intrinsic_dimension(
        net(), loss, lambda model: accuracy(model, *held), options.dimensions,
        steps=options.steps, seeds=seeds, projection=options.projection,
        said=options.said, bisections=options.bisections, progress=False,
    )  # fmt: skip
    print(found, flush=True)
    print(f"\n{'net':>14}{'numbers':>9}{'file, bytes':>13}{'held out':>10}{'test':>8}")
    rows: list[dict[str, Any]] = []
    for name, vector, width in (
        *(("PRANC", dimension, 64) for dimension in options.vectors),
        *((f"{width} hidden", None, width) for width in options.widths),
    ):
        numbers = vector or sum(p.numel() for p in net(0, width).parameters())
        runs = {
            rate: [trained(vector, width, loss, rate, options.steps, seed) for seed in seeds]
            for rate in options.rates
        }
        right = {
            rate: mean(accuracy(model, *held) for model, _ in each) for rate, each in runs.items()
        }
        best = runs[max(right, key=right.__getitem__)]
        test = mean(accuracy(model, images.test_x, images.test_y) for model, _ in best)
        print(f"{name:>14}{numbers:>9,}{best[0][1]:>13,}{max(right.values()):>10.4f}{test:>8.4f}",
              flush=True)  # fmt: skip
        rows.append({"net": name, "numbers": numbers, "bytes": best[0][1], "test": test,
                     "held_out": max(right.values())})  # fmt: skip
    if options.write:
        keep("subspace", rows, options.seeds - 1, settings=vars(options), intrinsic=str(found),
             gallery=shown(images.name, rows))  # fmt: skip


def shown(bed: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of PRANC, and those of small nets in as many numbers or more."""
    whole = sum(p.numel() for p in net().parameters())
    small = ", ".join(
        f"{row['numbers']}: {100 * row['test']:.1f}" for row in rows if row["net"] != "PRANC"
    )
    return [
        figure(
            "controllers", "Subspace", bed,
            f"numbers, of {whole:,}, as PRANC (smaller nets in {small})",
            row["numbers"] / whole, "top-1, %", 100 * row["test"],
        )
        for row in rows if row["net"] == "PRANC"
    ]  # fmt: skip


def trained(
    vector: int | None, width: int, loss: Any, rate: float, steps: int, seed: int
) -> tuple[nn.Module, int]:
    """The net as it comes out of its file, and the bytes of that."""
    model: nn.Module = net(seed, width)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    controller = None
    if vector is not None:
        controller = Subspace(model, optimizer, dimension=vector, projection="kaiming",
                              start="seed", precision="float16", seed=seed)  # fmt: skip
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        if controller is not None:
            controller.before_step()
        optimizer.step()
        if controller is not None:
            controller.after_step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        if controller is None:
            half = {name: tensor.half() for name, tensor in model.state_dict().items()}
            save_file(half, path)
            model.load_state_dict(load_file(path))
        else:
            controller.seeded().save(path)
            ours = controller.finish()
            model = lowrank.load_seeded(path, net(seed + 1))
            pairs = zip(model.parameters(), ours.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        return model, path.stat().st_size


if __name__ == "__main__":
    main()
