"""A network as a seed and a short vector: how few random directions learn the digits?

A net of 64 – 64 – 10 (4,810 parameters) is trained on scikit-learn's digits: whole, in random
subspaces of rising dimension (arXiv 1804.08838), and as PRANC (arXiv 2206.08464), whose file holds
a vector and no weights. Scores are accuracies on a fifth of the training images, by which learning
rates are chosen too; the last column of the second table is of the test images.

    python recipes/subspace.py                        # about two minutes
    python recipes/subspace.py --seeds 1 --steps 200  # less

Li et al. call d₉₀ the dimension at which 90 % of the full accuracy is reached. PRANC's abstract
claims about a hundredth of the numbers at better accuracy than other methods of that size; theirs
are of networks for images in colour, and none is compared here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from images import accuracy, digits
from torch import Tensor, nn

import lowrank
from lowrank.train import Subspace, intrinsic_dimension

BATCH = 64


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[25, 50, 100, 200, 400])
    parser.add_argument("--bisections", type=int, default=2)
    parser.add_argument("--vectors", type=int, nargs="+", default=[100, 200, 400, 800])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--projection", default="dense", choices=["dense", "sparse", "fastfood"])
    parser.add_argument("--said", action="store_true", help="train a scale of each tensor")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = digits(8)
    fifth = len(images.x) // 5
    held, x, y = (images.x[:fifth], images.y[:fifth]), images.x[fifth:], images.y[fifth:]

    def loss(model: nn.Module, step: int) -> Tensor:
        rows = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(step))
        return nn.functional.cross_entropy(model(x[rows]), y[rows])

    print(f"{images.name}: {len(x)} to train, {fifth} held out, {len(images.test_x)} to test")
    found = intrinsic_dimension(
        net(), loss, lambda model: accuracy(model, *held), options.dimensions,
        steps=options.steps, seeds=range(options.seeds), projection=options.projection,
        said=options.said, bisections=options.bisections, progress=False,
    )  # fmt: skip
    print(found, flush=True)
    print(f"\n{'PRANC':>6}{'file, bytes':>13}{'of weights':>12}{'held out':>10}{'test':>8}")
    size = sum(4 * p.numel() for p in net().parameters())
    for dimension in options.vectors:
        scores = [
            pranc(dimension, loss, held, images, options, seed) for seed in range(options.seeds)
        ]
        stored, right, test = (sum(column) / len(scores) for column in zip(*scores, strict=True))
        print(f"{dimension:>6}{stored:>13,.0f}{stored / size:>12.3f}{right:>10.4f}{test:>8.4f}",
              flush=True)  # fmt: skip


def pranc(
    dimension: int, loss: Any, held: Any, images: Any, options: argparse.Namespace, seed: int
) -> tuple[int, float, float]:
    """Bytes of the file, and accuracy of the net that is computed from it, held out and test."""
    model = net(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    controller = Subspace(model, optimizer, dimension=dimension, projection="kaiming",
                          start="seed", precision="float16", seed=seed)  # fmt: skip
    for step in range(options.steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        controller.seeded().save(path)
        again = lowrank.load_seeded(path, net(seed + 1))
        assert all(
            torch.equal(a, b)
            for a, b in zip(again.parameters(), controller.finish().parameters(), strict=True)
        )
        stored = path.stat().st_size
    return stored, accuracy(again, *held), accuracy(again, images.test_x, images.test_y)


if __name__ == "__main__":
    main()
