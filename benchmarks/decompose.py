"""Is the decomposition exact, and does it cost no more than LAPACK's?

    python benchmarks/decompose.py [--pairs 5] [--sizes 1024x1024,4096x1024]

For each size and spectrum: excess = (‖W − Ŵ‖² − optimum) / ‖W‖² at a quarter of the ranks, the
optimum taken from LAPACK's singular values in fp64, and the median of paired time ratios
(ours / gesdd in fp32), the two run alternately.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from machine import keep
from torch import Tensor

from lowrank import linalg

SPECTRA = ("k^-0.5", "k^-2", "exponential", "planted rank")


def spectrum(name: str, count: int) -> Tensor:
    index = torch.arange(1, count + 1, dtype=torch.float64)
    return {
        "k^-0.5": index**-0.5,
        "k^-2": index**-2.0,
        "exponential": torch.exp(-20 * index / count),
        "planted rank": torch.where(index <= count // 8, 1.0, 1e-3),
    }[name]


def planted(rows: int, columns: int, values: Tensor, generator: torch.Generator) -> Tensor:
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator)).Q.double()
        for n in (rows, columns)
    )
    return ((left * values) @ right.T).float()


def excess(weight: Tensor, rank: int) -> float:
    up, down = linalg.factor(weight, rank)
    reached = linalg.squared_error(weight, up.double() @ down.double())
    energy = torch.linalg.svdvals(weight.double()).square()
    return (reached - float(energy[rank:].sum())) / float(energy.sum())


def timed(call: object) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="1024x1024,2048x2048,4096x1024,4096x4096")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    rows = []
    print(f"{'size':>10}  {'spectrum':13} {'excess':>9}  {'ours s':>7} {'gesdd s':>7} {'ratio':>6}")
    for size in arguments.sizes.split(","):
        height, width = map(int, size.split("x"))
        rank = min(height, width) // 4
        for name in SPECTRA:
            weight = planted(height, width, spectrum(name, min(height, width)), generator)
            pairs = [
                (
                    timed(lambda w=weight, r=rank: linalg.factor(w, r)),
                    timed(lambda w=weight: torch.linalg.svd(w, full_matrices=False)),
                )
                for _ in range(arguments.pairs)
            ]
            row = {
                "size": size,
                "spectrum": name,
                "rank": rank,
                "excess": excess(weight, rank),
                "ours_s": statistics.median(a for a, _ in pairs),
                "gesdd_fp32_s": statistics.median(b for _, b in pairs),
                "ratio": statistics.median(a / b for a, b in pairs),
            }
            rows.append(row)
            print(
                f"{size:>10}  {name:13} {row['excess']:9.1e}  {row['ours_s']:7.2f} "
                f"{row['gesdd_fp32_s']:7.2f} {row['ratio']:6.2f}",
                flush=True,
            )
    print(
        f"largest excess {max(r['excess'] for r in rows):.1e}, "
        f"median ratio {statistics.median(r['ratio'] for r in rows):.2f}, "
        f"largest {max(r['ratio'] for r in rows):.2f}"
    )
    keep("decompose", rows, pairs=arguments.pairs)


if __name__ == "__main__":
    main()
