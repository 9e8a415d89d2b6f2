"""One file for many ratios beside models made for each of them, at one budget of gradient steps.

    python benchmarks/nested.py [--steps 64] [--only NAME …] [--judged 32] [--title NAME]

The embedded model, calibrated on 96 rows of 256 tokens; `two-sided`, uniform ranks, plain factors,
the sequential refit and distillation at 4 rows a step, as `best` has it. "separate": a model for
every ratio, `--steps` each. "nested": one model at the largest ratio that is distilled over sampled
ranks for as many steps as all of those together, and cut by `at_rank`. "one rank": the same steps
at its own rank alone, then cut. "refit", "whitened": no gradient step, cut too. KL on held-out
rows; fp32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from machine import keep
from quality import drawn

import lowrank
from lowrank import Recovery, demo
from lowrank.demo import judge

RATIOS = (0.9, 0.8, 0.6, 0.5, 0.4)
ROWS = 4  # of a step
PLAIN = {"policy": "uniform", "storage": "factors"}
WAYS = ("separate", "nested", "one rank", "refit", "whitened")


def models(way: str, dense: Any, data: Any, steps: int) -> Iterator[tuple[float, Any]]:
    """A model of every ratio."""

    def compressed(ratio: float, **options: Any) -> Any:
        asked = {**PLAIN, **options}
        return lowrank.compress(dense, ratio, data=data, copy=True, progress=False, **asked)[0]

    most, together = RATIOS[0], steps * len(RATIOS)
    if way == "separate":
        for ratio in RATIOS:
            yield ratio, compressed(ratio, effort=Recovery(distill_steps=steps, rows=ROWS))
        return
    options: dict[str, Any] = {
        "nested": {"effort": Recovery(distill_steps=together, rows=ROWS, nested=RATIOS[-1])},
        "one rank": {"effort": Recovery(distill_steps=together, rows=ROWS)},
        "refit": {"effort": Recovery(temperature=False)},
        "whitened": {"method": "whitened"},
    }[way]
    whole = compressed(most, **options)
    for ratio in RATIOS:
        yield ratio, whole if ratio == most else lowrank.at_rank(whole, ratio, copy=True)[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--only", nargs="+", default=list(WAYS))
    parser.add_argument("--judged", type=int, default=32)
    parser.add_argument("--title", default="nested")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tiny = demo.tiny_lm()
    ids = torch.tensor(tiny.tokenizer(tiny.calibration, verbose=False)["input_ids"])
    rows = drawn(ids[: len(ids) // 256 * 256].view(-1, 256), 96, 0)
    data = lowrank.calibrate(tiny.model, list(rows.split(16)), hold_out=1 / 8, progress=False)
    data = lowrank.with_fisher(tiny.model, data, progress=False)
    held_out = demo.held_out_rows(tiny)[: args.judged]
    found: list[dict[str, Any]] = []
    for way in args.only:
        started = time.perf_counter()
        made = dict(models(way, tiny.model, data, args.steps))
        seconds = time.perf_counter() - started
        judged = judge([tiny.model, *made.values()], held_out)[1:]
        for (ratio, model), (perplexity, kl) in zip(made.items(), judged, strict=True):
            params = sum(p.numel() for p in model.parameters())
            found.append({
                "way": way, "ratio": ratio, "params": params, "kl": kl, "perplexity": perplexity,
                "seconds_of_the_way": seconds,
            })  # fmt: skip
            print(f"{way:10} {ratio:.1f} {params:8,} KL {kl:.4f} ppl {perplexity:.2f}", flush=True)
        keep(args.title, found, steps=args.steps, rows_of_a_step=ROWS, held_out=len(held_out))


if __name__ == "__main__":
    main()
