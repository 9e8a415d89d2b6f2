"""What does a non-negative factor cost, in error and in time?

    python benchmarks/snmf.py [--ratios 0.3,0.5,0.7]

On every linear layer of the embedded model: lost share of ‖W‖² of semi-NMF and of the SVD of the
same rank and of one less (between which it lies), summed over the layers, and seconds of each.
"""

from __future__ import annotations

import argparse
import time

import torch
from machine import keep
from torch import Tensor, nn

from lowrank import linalg
from lowrank.demo import tiny_lm
from lowrank.linalg.snmf import ITERATIONS


def lost(weight: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    up, down = factors
    return linalg.squared_error(weight, up.double() @ down.double())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ratios", default="0.3,0.5,0.7")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    layers = tiny_lm().model.model.layers
    weights = [m.weight.detach() for m in layers.modules() if isinstance(m, nn.Linear)]
    whole = sum(float(weight.double().square().sum()) for weight in weights)
    print(f"{len(weights)} layers, lost share of the squared norm")
    print(
        f"{'kept':>5} {'svd':>8} {'snmf':>8} {'start':>8} {'svd r-1':>8} {'svd s':>7} {'snmf s':>7}"
    )
    rows = []
    for ratio in map(float, arguments.ratios.split(",")):
        sums = dict.fromkeys(("svd", "snmf", "start", "svd_one_less", "svd_s", "snmf_s"), 0.0)
        for weight in weights:
            rank = max(int(ratio * weight.numel() / sum(weight.shape)), 2)
            tails = linalg.tails(linalg.energies(weight))
            begun = time.perf_counter()
            sums["svd"] += lost(weight, linalg.factor(weight, rank)) / whole
            between = time.perf_counter()
            sums["snmf"] += lost(weight, linalg.semi_nmf(weight, rank)) / whole
            sums["snmf_s"] += time.perf_counter() - between
            sums["svd_s"] += between - begun
            start = linalg.semi_nmf(weight, rank, iterations=0)
            sums["start"] += lost(weight, start) / whole
            sums["svd_one_less"] += float(tails[rank - 1]) / whole
        print(
            f"{ratio:5.2f} {sums['svd']:8.5f} {sums['snmf']:8.5f} {sums['start']:8.5f} "
            f"{sums['svd_one_less']:8.5f} {sums['svd_s']:7.2f} {sums['snmf_s']:7.2f}"
        )
        rows.append({"ratio": ratio, **sums})
    keep("snmf", rows, iterations=ITERATIONS)


if __name__ == "__main__":
    main()
