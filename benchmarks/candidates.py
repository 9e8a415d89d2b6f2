"""KL of the candidates for the ranks, before and after the closed-form refit on a few rows.

    python benchmarks/candidates.py [--ratios 0.8 0.6 0.4]

The embedded model, `effort="fast"`. "near": refitted by compress, since its KL before the refit is
within allocating.NEAR of the least.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from machine import keep

import lowrank
from lowrank import demo
from lowrank.api import allocating
from lowrank.api.allocating import NEAR, Judge
from lowrank.types import Allocation


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    ratios = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    parser.add_argument("--ratios", type=float, nargs="+", default=ratios)
    given = parser.parse_args()
    torch.set_num_threads(2)
    tiny, compare, rows = demo.tiny_lm(), Judge.compare, []
    ids = torch.tensor(tiny.tokenizer(tiny.calibration, verbose=False)["input_ids"])
    data = list(ids[: len(ids) // 256 * 256].view(-1, 256)[:192].split(16))
    found: list[tuple[list[float], list[float]]] = []

    def both(judge: Judge, allocations: Sequence[Allocation]) -> list[float]:
        before = compare(replace(judge, recovery=None), allocations)
        after = compare(judge, allocations)  # all of them: see below
        found.append((before, after))
        return after

    Judge.compare = both  # type: ignore[method-assign]
    allocating.NEAR = float("inf")
    for ratio in given.ratios:
        found.clear()
        model = copy.deepcopy(tiny.model)
        lowrank.compress(model, ratio, data=data, effort="fast", progress=False)
        for before, after in found:
            near = sum(value <= NEAR * min(before) for value in before)
            same = before.index(min(before)) == after.index(min(after))
            rows.append(
                {"ratio": ratio, "before": before, "after": after, "near": near, "same": same}
            )
            figures = [" ".join(f"{value:7.4f}" for value in each) for each in (before, after)]
            best = "the same is best" if same else "ANOTHER is best"
            print(f"{ratio}: before {figures[0]}  after {figures[1]}  near {near}  {best}")
    keep("candidates", rows, near=NEAR)


if __name__ == "__main__":
    main()
