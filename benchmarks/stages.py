"""CPU seconds of every stage of closed-form compression, beside the pass that gathers statistics.

    python benchmarks/stages.py [--rows 128] [--repeats 3]

The embedded model at 0.6, fp32, rows of 256 tokens. `statistics`: one forward pass with Gram
matrices (E[x xᵀ]). Closed form: `spectra` of all weights, `ranks` (uniform, or the knapsack
without a probe) and `factors`. Apart from them: `gradients` (output Gram, one backward pass) and
`refit`: the sequential pass, which runs the model twice more, and what it decomposes. Medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from machine import keep

import lowrank
from lowrank import Recovery, demo
from lowrank.api.planning import make_plan
from lowrank.api.request import Request
from lowrank.api.verbs import targets_of

RATIO = 0.6
WAYS = {
    "whitened": {"policy": "uniform", "storage": "factors"},
    "two-sided": {"policy": "lossaware", "storage": "pivoted"},
}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()  # of one thread: what else the machine does hardly matters
    found = run()
    return time.process_time() - started, found


def stages(model: Any, rows: torch.Tensor, method: str) -> dict[str, float]:
    """Seconds of one run, by stage."""
    found: dict[str, float] = {}
    data, quiet = list(rows.split(16)), {"progress": False}
    found["statistics"], seen = timed(lambda: lowrank.calibrate(model, data, **quiet))
    if method == "two-sided":
        found["gradients"], seen = timed(lambda: lowrank.with_fisher(model, seen, **quiet))
    ways: dict[str, Any] = WAYS[method]
    request = Request(ratio=RATIO, method=method, align=1, **ways)
    wanted = targets_of(model, request)
    unprobed = {**ways, "policy": "uniform" if method == "whitened" else bare_lossaware}
    request = Request(ratio=RATIO, method=method, align=1, **unprobed)
    both, (plan, _) = timed(lambda: make_plan(model, request, wanted, seen, **quiet))
    found["ranks"], _ = timed(lambda: make_plan(model, request, wanted, seen, **quiet))
    found["spectra"] = max(both - found["ranks"], 0.0)  # the second time they are remembered
    found["factors"], _ = timed(lambda: lowrank.apply(model, plan, data=seen, copy=True, **quiet))
    effort = {"data": seen, "align": 1, "copy": True, "method": method, **unprobed, **quiet}
    whole, _ = timed(lambda: lowrank.compress(model, RATIO, effort=Recovery(), **effort))
    found["refit"] = whole - found["ranks"] - found["factors"]
    return found


def bare_lossaware(curves: Any, budget: Any, _probe: Any = None) -> Any:
    return lowrank.POLICIES["lossaware"]()(curves, budget, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiny = demo.tiny_lm()
    ids = torch.tensor(tiny.tokenizer(tiny.calibration, verbose=False)["input_ids"])
    rows = ids[: args.rows * 256].view(args.rows, 256)
    kept = []
    for method in WAYS:
        runs = [stages(tiny.model, rows, method) for _ in range(args.repeats)]
        middle = {name: median(run[name] for run in runs) for name in runs[0]}
        closed = [run["spectra"] + run["ranks"] + run["factors"] for run in runs]
        share = median(c / run["statistics"] for c, run in zip(closed, runs, strict=True))
        print(f"{method}: " + ", ".join(f"{name} {value:.2f} s" for name, value in middle.items()))
        print(f"  closed form: {median(closed):.2f} s, {share:.2f} of the statistics' seconds")
        kept.append({"method": method, "seconds": middle, "closed_over_statistics": share})
    keep("stages", kept, calibration_rows=args.rows, ratio=RATIO)


if __name__ == "__main__":
    main()
