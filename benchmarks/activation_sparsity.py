"""Semi-structured activation sparsity: what does it cost in accuracy, and what does it save here?

    python benchmarks/activation_sparsity.py

Grimaldi et al. (arXiv 2309.06626) drop the same share of positions from all channels of every
convolution's output: one random map at the input's resolution is averaged to each output's, and
its lowest scores are dropped. It is drawn anew in every step while the share rises, then frozen.
A dropped position is a column less in the product of im2col. The authors have a runtime for that;
here the product is of gathered columns in plain PyTorch, beside `conv2d`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import keep
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from images import accuracy, digits

SHARES = (0.0, 0.1, 0.2, 0.3, 0.5)
LAYERS = (
    (16, 32, 3),
    (64, 8, 3),
    (64, 56, 3),
    (128, 28, 3),
    (256, 14, 3),
    (512, 7, 3),
    (256, 14, 1),
)
RAMP = 0.6  # of the steps; then the map is frozen


class Positions:
    """Masks of the outputs of a net's convolutions, by hooks."""

    def __init__(self, net: nn.Module, side: int, seed: int) -> None:
        self.rng, self.side, self.share = torch.Generator().manual_seed(seed), side, 0.0
        self.draw()
        self.hooks = [m.register_forward_hook(self) for m in net if isinstance(m, nn.Conv2d)]

    def draw(self) -> None:
        self.scores = torch.rand(1, 1, self.side, self.side, generator=self.rng)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        scores = F.adaptive_avg_pool2d(self.scores, output.shape[-2:]).flatten()
        mask = torch.ones_like(scores)
        mask[scores.topk(round(self.share * len(scores)), largest=False).indices] = 0
        return output * mask.view(output.shape[-2:])


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip


def trained(share: float, seed: int, images: Any, steps: int) -> tuple[nn.Sequential, Positions]:
    torch.manual_seed(seed)
    model = net()
    masks = Positions(model, images.x.shape[-1], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        done = min(step / (RAMP * steps), 1)
        masks.share = share * (1 - (1 - done) ** 2)
        if done < 1:
            masks.draw()
        batch = torch.randint(len(images.x), (64,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(model(images.x[batch]), images.y[batch]).backward()
        optimizer.step()
        schedule.step()
    return model, masks


def of_digits(seeds: int, steps: int) -> list[dict[str, Any]]:
    """Trained with the share, and trained dense with the share put on afterwards."""
    images, rows = digits(16), []
    for seed in range(seeds):
        for share in SHARES:
            model, masks = trained(share, seed, images, steps)
            row = {"share": share, "seed": seed}
            row["trained"] = accuracy(model, images.test_x, images.test_y)
            if share == 0:
                dense, later = model, masks
            later.share = share
            row["afterwards"] = accuracy(dense, images.test_x, images.test_y)
            rows.append(row)
    for share in SHARES:
        every = [row for row in rows if row["share"] == share]
        means = [sum(row[key] for row in every) / seeds for key in ("trained", "afterwards")]
        print(f"digits, {share:.1f} dropped: trained so {means[0]:.3f}, afterwards {means[1]:.3f}")
    return rows


def times() -> list[dict[str, Any]]:
    """Processor time of one image over that of conv2d: of im2col, and of gathered columns."""
    rows = []
    print("channels, side, kernel: im2col, then gathered columns with a share dropped")
    for channels, side, kernel in LAYERS:
        x = torch.randn(1, channels, side, side)
        weight = torch.randn(channels, channels, kernel, kernel)
        flat, pad = weight.flatten(1), kernel // 2
        dense = _least(lambda: F.conv2d(x, weight, padding=pad))  # noqa: B023
        unfolded = _least(lambda: flat @ F.unfold(x, kernel, padding=pad)[0])  # noqa: B023
        gathered = {s: _least(_gathered(x, weight, s)) / dense for s in SHARES}
        rows.append({"layer": [channels, side, kernel], "conv2d_s": dense,
                     "im2col": unfolded / dense, "gathered": gathered})  # fmt: skip
        print(
            f"{channels:4} {side:3} {kernel}: {unfolded / dense:.2f}; "
            + " ".join(f"{share}: {value:.2f}" for share, value in gathered.items())
        )
    return rows


def _gathered(x: Tensor, weight: Tensor, share: float) -> Callable[[], Tensor]:
    """The convolution at the kept positions alone, zero elsewhere."""
    _, channels, side, _ = x.shape
    kernel, flat = weight.shape[-1], weight.flatten(1)
    pad, wide = kernel // 2, side + 2 * (kernel // 2)
    rng = torch.Generator().manual_seed(0)
    at = (
        torch.randperm(side * side, generator=rng)[: round((1 - share) * side * side)].sort().values
    )
    corner = at // side * wide + at % side
    window = torch.arange(kernel)[:, None] * wide + torch.arange(kernel)
    index = (torch.arange(channels)[:, None] * wide**2 + window.flatten()).flatten()[
        :, None
    ] + corner

    def run() -> Tensor:
        columns = F.pad(x, (pad,) * 4).view(-1)[index]
        y = x.new_zeros(len(weight), side * side)
        y[:, at] = flat @ columns
        return y.view(1, -1, side, side)

    whole = F.conv2d(x, weight, padding=pad).flatten(2)[..., at]
    torch.testing.assert_close(run().flatten(2)[..., at], whole, rtol=1e-3, atol=1e-2)
    return run


def _least(run: Callable[[], Tensor], times: int = 15) -> float:
    taken = []
    for _ in range(times):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        measured = times()
    keep("activation_sparsity", of_digits(arguments.seeds, arguments.steps), times=measured)


if __name__ == "__main__":
    main()
