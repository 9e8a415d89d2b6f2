"""How many rows calibrate a real language model, and how far from them is what it writes itself?

    LOWRANK_ASSETS=… python benchmarks/calibration_rows.py FOLDER [--rows 16 32 64 128 256]
        [--written 48] [--ratios 0.8 0.6] [--threads 2] [--title NAME]
    … --only rows    (or written)

SmolLM2-135M-Instruct (see real_llm.py), `whitened`, uniform ranks, plain factors, fp32; judged on
rows of 257 tokens of WikiText-2 test and of TinyStories. "rows": the first rows of WikiText-2
valid, of 256 tokens each, every count on top of the one before. "written": as many rows of real
text and of the model's own, sampled

    usual           at temperature 1, a quarter of the rows from the start token, the others from a
                    random token (`data="self"`)
    temperature 0.7 the same, less random
    chat            from the model's chat template up to where a user begins to write

"repeated" is the share of runs of eight tokens that stand in the rows before: what taking out
duplicates could gain.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import keep
from real_llm import LENGTH, WAYS, Judged, line, measured, rows_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank
from lowrank.calibration import self_written
from lowrank.types import Statistics

WAY = "whitened (SVD-LLM)"
RUN = 8  # tokens
AT_ONCE = 16  # rows


def added(one: Statistics, other: Statistics) -> Statistics:
    """Statistics of all tokens of both."""
    count = one.count + other.count
    parts = [part.count / max(count, 1) for part in (one, other)]

    def mean(of: str) -> Tensor | None:
        a, b = getattr(one, of), getattr(other, of)
        return None if a is None or b is None else parts[0] * a + parts[1] * b

    freq = None if one.freq is None or other.freq is None else one.freq + other.freq
    return Statistics(count, mean("gram"), mean("mean"), freq)


def together(one: lowrank.Calibration | None, other: lowrank.Calibration) -> lowrank.Calibration:
    """A calibration on the rows of both; sites that read one tensor go on sharing."""
    if one is None:
        return other
    sums: dict[tuple[int, int], Statistics] = {}
    statistics = {}
    for site, first in one.statistics.items():
        second = other.statistics[site]
        pair = (id(first), id(second))
        if pair not in sums:
            sums[pair] = added(first, second)
        statistics[site] = sums[pair]
    return replace(one, statistics=statistics, tokens=one.tokens + other.tokens, spectra={})


def written(dense: Any, tokenizer: Any, kind: str, rows: int) -> Tensor:
    """Rows (rows, LENGTH) that the model writes."""
    if kind == "chat":
        talk = tokenizer.apply_chat_template(
            [{"role": "user", "content": "…"}], tokenize=False
        ).split("…")[0]
        begun = torch.tensor([tokenizer(talk)["input_ids"]] * rows)
        torch.manual_seed(0)
        return dense.generate(
            begun, attention_mask=torch.ones_like(begun), do_sample=True, top_k=0, top_p=1.0,
            min_new_tokens=LENGTH - begun.shape[1], max_new_tokens=LENGTH - begun.shape[1],
            eos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    heat = 0.7 if kind == "temperature 0.7" else 1.0
    usual = self_written._drawn
    self_written._drawn = lambda logits, chances: usual(logits / heat, chances)
    try:
        return self_written.write(dense, rows=rows, length=LENGTH)
    finally:
        self_written._drawn = usual


def repeated(rows: Tensor) -> float:
    """Share of the runs of RUN tokens, of rows (n, length), that were there before."""
    runs = [tuple(run) for row in rows.tolist() for run in zip(*(row[i:] for i in range(RUN)))]  # noqa: B905
    return 1 - len(set(runs)) / len(runs)


def kinds(
    dense: Any, tokenizer: Any, args: argparse.Namespace
) -> Iterator[tuple[str, int, float, lowrank.Calibration]]:
    """What is calibrated on: its name, rows, share that is repeated, and the calibration."""
    real = rows_of(tokenizer, "wikitext2_valid.txt", LENGTH, max([*args.rows, args.written]))
    if "rows" in args.only:
        so_far, begun = None, 0
        for count in args.rows:
            more = lowrank.calibrate(dense, list(real[begun:count].split(AT_ONCE)), progress=False)
            so_far, begun = together(so_far, more), count
            yield "WikiText-2 valid", count, repeated(real[:count]), so_far
    if "written" in args.only:
        for kind in ("WikiText-2 valid", "usual", "temperature 0.7", "chat"):
            rows = (
                real[: args.written] if kind == "WikiText-2 valid"
                else written(dense, tokenizer, kind, args.written)
            )  # fmt: skip
            seen = lowrank.calibrate(dense, list(rows.split(AT_ONCE)), progress=False)
            yield kind, args.written, repeated(rows), seen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--written", type=int, default=48, help="rows of each kind")
    parser.add_argument("--only", nargs="+", default=["rows", "written"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--judged", type=int, default=32, help="rows of WikiText-2 test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--title", default="calibration_rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    dense = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    texts = {
        "wikitext": Judged(dense, rows_of(tokenizer, "wikitext2_test.txt", 257, args.judged)),
        "stories": Judged(dense, rows_of(tokenizer, "tinystories_valid_30KB.txt", 257, 64)),
    }
    found: list[dict[str, Any]] = []
    for kind, rows, again, seen in kinds(dense, tokenizer, args):
        for ratio in args.ratios:
            about = {"way": kind, "rows": rows, "repeated": again}
            found.append(about | measured(dense, ratio, seen, WAYS[WAY], texts))
            print(f"{rows:4} rows, {again:.3f} repeated: {line(found[-1])}", flush=True)
            keep(args.title, found, model="SmolLM2-135M-Instruct", length=LENGTH)


if __name__ == "__main__":
    main()
