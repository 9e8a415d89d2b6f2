"""KL of `fast` with the parts of its closed-form recovery put in one by one, at the same ranks.

    python benchmarks/refit.py [--model FOLDER --text FILE] [--ratios 0.8 0.6 0.4] [--rows 192]

The rows are those of benchmarks/quality.py, seed 0; ranks are chosen once, with the default one.
"own outputs" fits layers that are added to a stream to their own outputs, not to the sum.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from machine import keep
from quality import drawn, rows_of

import lowrank
from lowrank import Recovery
from lowrank.demo import judge

PLAIN: dict[str, Any] = {"shrinkage": 0.0, "temperature": False}
WAYS = {
    "own outputs, dense 0.5": Recovery(sums=False, dense=0.5, **PLAIN),
    "sums, dense 0.5": Recovery(dense=0.5, **PLAIN),
    "sums, dense 1": Recovery(dense=1.0, **PLAIN),
    "sums, dense 0.9 to 0.5": Recovery(**PLAIN),
    "and the temperature": Recovery(shrinkage=0.0),
    **{f"and shrinkage {s:g}": Recovery(shrinkage=s) for s in (0.5, 1.0, 2.0, 4.0)},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--only", nargs="+", default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dense, calibration, held_out = rows_of(args)
    title = "embedded" if args.model is None else Path(args.model).name
    data = lowrank.calibrate(
        dense, list(drawn(calibration, args.rows, 0).split(16)), hold_out=0.125, progress=False
    )
    found: list[dict[str, Any]] = []
    for ratio in args.ratios:
        plan = lowrank.plan(dense, ratio, data=data, effort="fast", align=1, progress=False)
        for name in args.only:
            recovery = WAYS[name].to_json()
            own = dataclasses.replace(plan, settings={**plan.settings, "recovery": recovery})
            model, report = lowrank.apply(dense, own, data=data, copy=True, progress=False)
            (_, (ppl, away)) = judge([dense, model], held_out)
            found.append({"way": name, "ratio": ratio, "kl": away, "perplexity": ppl})
            found[-1]["notes"] = report.notes
            print(f"{name:32} {ratio} KL {away:.4f} perplexity {ppl:.2f}", flush=True)
            keep(f"refit_{title}", found, rows_of=args.rows or len(calibration))


if __name__ == "__main__":
    main()
