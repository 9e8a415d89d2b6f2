"""What was tried for `best`: KL with other rates, optimizers, shares of steps and written rows.

    python benchmarks/best.py [--only NAME …] [--ratios 0.6] [--seeds 0 1 2] [--steps 0.25]
                              [--model FOLDER --text FILE] [--rows 192] [--title NAME]

Without --model: the model inside the package. All ways train on as many tokens as `best` with this
share of its steps: those with fewer rows a step take more steps. Judged on the calibration rows
that the seed did not draw, so that no choice depends on the held-out text of quality.py.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import keep
from quality import drawn, measured, rows_of

import lowrank
from lowrank.recover.recovery import Effort

BEST = lowrank.EFFORTS["best"]
STEPS = BEST.recovery.block_steps + BEST.recovery.distill_steps
FIXED = {"block_rate": 0.01, "distill_rate": 0.0025}  # the rates, where nothing else is said
WAYS: dict[str, dict[str, Any]] = {
    "best": {},
    **{
        f"distilled at {rate}": FIXED | {"distill_rate": rate}
        for rate in (0.0012, 0.0015, 0.0025, 0.004, 0.005, 0.01)
    },
    "blocks at 0.005": FIXED | {"block_rate": 0.005},
    "distillation alone": FIXED | {"block_steps": 0, "distill_steps": STEPS},
    "half of the steps in blocks": FIXED | {"block_steps": STEPS // 2, "distill_steps": STEPS // 2},
    "calibration rows alone": FIXED | {"written": 0},
    "twice the written rows": FIXED | {"written": 2 * BEST.recovery.written},
    "AdamW": {"optimizer": "adamw"},
    "AdamW, 16 rows a step": {"optimizer": "adamw", "rows": 16, "block_rate": 0.01},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=float, default=0.25)
    parser.add_argument("--title", default="best")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dense, rows, _ = rows_of(args)
    if args.rows >= len(rows):
        parser.error(f"--rows must leave some of the {len(rows)} rows to judge on")
    found: list[dict[str, Any]] = []
    for seed in args.seeds:
        order = drawn(rows, len(rows), seed)
        data, others = list(order[: args.rows].split(16)), list(order[args.rows :])
        for ratio in args.ratios:
            for name in args.only:
                options = {"effort": way(WAYS[name], args.steps)}
                row = measured(dense, ratio, data, seed, options, others)
                found.append({"way": name, "seed": seed} | row)
                print(
                    f"{name:28} {ratio} seed {seed} KL {row['kl']:.4f} {row['seconds']:.0f} s",
                    flush=True,
                )
                keep(
                    args.title, found, steps_share=args.steps, judged_rows=len(others),
                    model=Path(args.model).name if args.model else "embedded",
                )  # fmt: skip


def way(changes: dict[str, Any], share: float) -> Effort:
    """`best` with these changes of its Recovery, on a share of the tokens."""
    recovery = replace(BEST.recovery, **changes)
    share *= BEST.recovery.rows / recovery.rows
    steps = {n: round(share * getattr(recovery, n)) for n in ("block_steps", "distill_steps")}
    return replace(BEST, recovery=replace(recovery, **steps))


if __name__ == "__main__":
    main()
