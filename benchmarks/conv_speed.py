"""How fast the factored forms of a convolution are, beside the dense one.

    python benchmarks/conv_speed.py [--pairs 7]

3×3 convolutions, fp32, one thread, half and a quarter of the dense one's products, images by
channel and channels last: medians of paired ratios, below 1 is faster than dense. At equal products
a form is slower where its pieces are too thin to fill the machine, or move more than they compute.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from machine import keep
from torch import nn

from lowrank.measure.timing import paired_ratio
from lowrank.nn import (
    ChannelConv,
    CPConv,
    Geometry,
    SpatialConv,
    TuckerConv,
    channel_cost,
    cp_cost,
    spatial_cost,
    tucker_cost,
)
from lowrank.types import Cost

SHARES = (0.5, 0.25)
# channels in, channels out, side of the image, stride
LAYERS = ((64, 64, 32, 1), (64, 128, 32, 2), (256, 256, 8, 1))
BATCHES = (1, 64)
Made = Callable[[int], tuple[nn.Module, Cost]]


def forms(geometry: Geometry) -> dict[str, tuple[int, Made]]:
    """By name: the largest rank, and how a layer of a rank is made on the meta device."""
    inputs, outputs = geometry.in_channels, geometry.out_channels
    taps = geometry.kernel_numbers
    costs = {"itemsize": 4}

    def tucker(rank: int) -> tuple[nn.Module, Cost]:
        ranks = (max(rank * outputs // inputs, 1), rank)
        return TuckerConv(geometry, ranks, bias=True), tucker_cost(geometry, *ranks, **costs)

    return {
        "channel": (min(outputs, inputs * taps), lambda r: (
            ChannelConv(geometry, r, bias=True), channel_cost(geometry, r, **costs))),
        "channel, kernel last": (min(outputs * taps, inputs), lambda r: (
            ChannelConv(geometry, r, bias=True, wide="last"),
            channel_cost(geometry, r, wide="last", **costs))),
        "tucker": (inputs, tucker),
        "spatial": (min(outputs, inputs) * 3, lambda r: (
            SpatialConv(geometry, r, bias=True), spatial_cost(geometry, r, **costs))),
        "cp": (inputs * outputs, lambda r: (
            CPConv(geometry, r, bias=True), cp_cost(geometry, r, **costs))),
    }  # fmt: skip


def fitting(most: int, made: Made, limit: float) -> tuple[nn.Module, Cost] | None:
    """The layer of the largest rank whose products are at most `limit`; None if one is too many."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if made(middle)[1].macs <= limit else (low, middle - 1)
    return made(low) if low else None


def filled(layer: nn.Module, form: torch.memory_format) -> nn.Module:
    layer = layer.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return layer.to(memory_format=form)  # type: ignore[call-overload, no-any-return]


def rows_of(layer: tuple[int, int, int, int], share: float, pairs: int) -> list[dict[str, Any]]:
    inputs, outputs, side, stride = layer
    geometry = Geometry.of(nn.Conv2d(inputs, outputs, 3, stride, 1))
    products = inputs * outputs * geometry.kernel_numbers
    rows = []
    for name, (most, made) in forms(geometry).items():
        found = fitting(most, made, share * products)
        if found is None:
            continue
        row = {"form": name, "layer": list(layer), "asked": share,
               "macs": found[1].macs / products, "params": found[1].params / products}  # fmt: skip
        for form in (torch.contiguous_format, torch.channels_last):
            dense = filled(nn.Conv2d(inputs, outputs, 3, stride, 1), form)
            new = filled(found[0], form)
            for batch in BATCHES:
                x = torch.randn(batch, inputs, side, side).to(memory_format=form)
                key = f"batch {batch}" + (", last" if form is torch.channels_last else "")
                row[key] = paired_ratio(partial(new, x), partial(dense, x), pairs, least_s=0.001)
        rows.append(row)
    return rows


def median_of(rows: list[dict[str, Any]], form: str, share: float, keys: list[str]) -> float:
    own = [row for row in rows if (row["form"], row["asked"]) == (form, share)]
    return statistics.median(row[key] for row in own for key in keys)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keys = [f"batch {b}{end}" for end in ("", ", last") for b in BATCHES]
    print(f"{'layer':18} {'form':21} {'products':>8} {'numbers':>8} "
          + " ".join(f"{key:>14}" for key in keys))  # fmt: skip
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for layer in LAYERS:
            for share in SHARES:
                for row in rows_of(layer, share, arguments.pairs):
                    rows.append(row)
                    inputs, outputs, side, stride = layer
                    head = f"{inputs}→{outputs} {side}² /{stride}"
                    times = " ".join(f"{row[k]:13.2f}{'*' if row[k] > 1 else ' '}" for k in keys)
                    print(f"{head:18} {row['form']:21} {row['macs']:8.3f} {row['params']:8.3f} "
                          f"{times}", flush=True)  # fmt: skip
    print("* slower than the dense convolution")
    for form in dict.fromkeys(row["form"] for row in rows):
        here = [row[key] for row in rows if row["form"] == form for key in keys]
        medians = ", ".join(
            f"{median_of(rows, form, share, keys):.2f} at {share:g} of the products"
            for share in SHARES
        )
        print(f"{form}: {sum(r > 1 for r in here)} of {len(here)} slower; medians {medians}")
    keep("conv_speed", rows)


if __name__ == "__main__":
    main()
