"""KL of ways to compress the experts of a small trained mixture, at equal stored parameters.

    python recipes/train_tiny_lm.py --out MIXTURE --experts 8 --tokens-per-parameter 4
    python benchmarks/experts.py MIXTURE [--ratios 0.8 0.6 0.4] [--only NAME …]

Calibrated on rows of 256 tokens of the mixture's own calibration text, judged on its held-out text;
float32, two threads. Ratios are of the targets: all experts and the attention.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from machine import keep

import lowrank
from lowrank import Recovery, demo
from lowrank.demo import judge

PLAIN = {"policy": "uniform", "storage": "factors"}
WAYS: dict[str, dict[str, Any]] = {
    "SVD of each expert": {"method": "svd", **PLAIN},
    "whitened, each expert": {"method": "whitened", **PLAIN},
    "whitened, pivoted": {"method": "whitened", "policy": "uniform", "storage": "pivoted"},
    "MPIFA-like": {
        "method": "whitened", "policy": "uniform", "storage": "pivoted",
        "effort": Recovery(dense=0.25),
    },
    "default": {},
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mixture", type=Path)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--only", nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(2)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(given.mixture, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(given.mixture)
    texts = [(given.mixture / f"{n}.txt").read_text("utf-8") for n in ("heldout", "calibration")]
    held = demo.held_out_rows(demo.TinyLM(model, tokenizer, *texts))
    ids = torch.tensor(tokenizer(texts[1], verbose=False)["input_ids"])
    data = [ids[: len(ids) // 256 * 256].view(-1, 256)]
    calibration = lowrank.calibrate(model, data, hold_out=0.2, progress=False)
    counts = [s.count for n, s in calibration.statistics.items() if ".experts.gate_up_proj." in n]
    print(f"{len(counts)} experts, given {min(counts):,} to {max(counts):,} tokens")
    ways = {name: WAYS[name] for name in given.only or WAYS}
    rows = []
    for ratio in given.ratios:
        for name, options in ways.items():
            start = time.perf_counter()
            source: Any = None if options.get("method") == "svd" else data
            small, report = lowrank.compress(
                model, ratio, data=source, copy=True, align=1, progress=False, **options
            )
            seconds = time.perf_counter() - start
            _, (perplexity, kl) = judge([model, small], held)
            row = {"ratio": ratio, "way": name, "kl": kl, "perplexity": perplexity}
            rows.append({**row, "kept": report.achieved, "seconds": seconds})
            print(f"{ratio:4} {name:24} KL {kl:.4f}  ppl {perplexity:7.2f}  {seconds:5.0f} s",
                  flush=True)  # fmt: skip
    if not given.only:
        keep("experts", rows, tokens=[min(counts), max(counts)])


if __name__ == "__main__":
    main()
