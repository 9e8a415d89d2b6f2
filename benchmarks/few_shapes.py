"""What products of many shapes leave in memory on the CPU, and what padded ranks cost.

    python benchmarks/few_shapes.py [--width 512] [--rows 2048] [--ranks 200]

One low-rank layer of every rank from 1 on multiplies the same rows in bf16, in a process of its
own: as it is, and with ranks padded to few (`lowrank.nn.few_shapes`). Printed are the memory that
is left when the layers are gone, and the time beside that of the layer as it is, of a layer of two
fifths of the width (medians of ratios, alternating): padded, and as one dense product.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from time import perf_counter

import torch
from machine import keep
from torch import Tensor
from torch.nn.functional import linear

from lowrank.nn import LowRankLinear
from lowrank.nn.few_shapes import even_ranks
from lowrank.plans.stages import anonymous_bytes

MIB, ROUNDS = 1 << 20, 21


def layer_of(width: int, rank: int) -> LowRankLinear:
    factors = torch.randn(rank, width), torch.randn(width, rank)
    return LowRankLinear.from_factors(*factors, None).bfloat16().requires_grad_(False)


@torch.no_grad()
def left(width: int, rows: int, ranks: int, *, padded: bool) -> float:
    """MiB that products of so many ranks leave behind."""
    x = torch.randn(rows, width).bfloat16()
    layer_of(width, width)(x)  # what any product needs
    before = anonymous_bytes()
    for rank in range(1, ranks + 1):
        layer = layer_of(width, rank)
        with even_ranks(layer) if padded else nullcontext():
            layer(x)
    del layer
    return (anonymous_bytes() - before) / MIB


def seconds(call: Callable[[], Tensor]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


@torch.no_grad()
def ratios(width: int, rows: int) -> dict[str, float]:
    """Time over that of the layer as it is, of a rank that no power of two divides."""
    layer, x = layer_of(width, 2 * width // 5 | 1), torch.randn(rows, width).bfloat16()
    dense = layer.dense_weight()
    found: dict[str, list[float]] = {"padded": [], "dense": []}
    for _ in range(ROUNDS):
        own = seconds(lambda: layer(x))
        with even_ranks(layer):
            found["padded"].append(seconds(lambda: layer(x)) / own)
        found["dense"].append(seconds(lambda: linear(x, dense)) / own)
    return {name: median(each[1:]) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--ranks", type=int, default=200)
    parser.add_argument("--memory", choices=("as it is", "padded"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(2)
    if given.memory:
        padded = given.memory == "padded"
        print(json.dumps(left(given.width, given.rows, given.ranks, padded=padded)))
        return
    row: dict[str, float] = {}
    for way in ("as it is", "padded"):
        own = [f"--{name}={getattr(given, name)}" for name in ("width", "rows", "ranks")]
        done = subprocess.run(
            [sys.executable, __file__, *own, "--memory", way],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        row[f"MiB left, {way}"] = json.loads(done.stdout)
        print(f"{given.ranks} ranks {way}: {row[f'MiB left, {way}']:.0f} MiB left")
    for width in (given.width, 2 * given.width, 4 * given.width):
        for name, ratio in ratios(width, given.rows).items():
            row[f"time, {name}, width {width}"] = ratio
            print(f"width {width}: {name} takes {ratio:.2f} times as long as it is")
    keep("few_shapes", [row], width=given.width, tokens=given.rows, ranks=given.ranks)


if __name__ == "__main__":
    main()
