"""The tied embedding of the embedded model: plain, frequency-weighted and head-aware.

    python benchmarks/embeddings.py

On the last 96 rows of the held-out text (24,576 tokens; constants were tried on other rows): the
embedding and head alone at three ratios, and the whole model at 0.6 of its weights, with the table
factored by each method.
Statistics come from the calibration text. At the end the model is saved and reloaded elsewhere.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from machine import keep
from safetensors import safe_open
from safetensors.torch import load_file

import lowrank
from lowrank.demo import LENGTH, RELOAD, held_out_rows, judge, tiny_lm
from lowrank.methods import METHODS

ROWS = 96
RATIOS = (0.8, 0.6, 0.4)
TABLES = ("svd", "frequency", "head-aware")


def main() -> None:
    torch.set_num_threads(2)
    tiny = tiny_lm()
    rows = held_out_rows(tiny)[-ROWS:]
    seen = lowrank.calibrate(
        tiny.model, tiny.calibration, tokenizer=tiny.tokenizer, length=LENGTH, progress=False
    )
    found = []
    models = [tiny.model]
    for ratio in RATIOS:
        for method in TABLES:
            model, report = lowrank.compress(
                tiny.model, ratio, method=method, data=seen, target_modules=["embed_tokens"],
                align=1, copy=True, progress=False,
            )  # fmt: skip
            models.append(model)
            found.append({"targets": "pair", "method": method, "ratio": ratio,
                          "kept_of_model": report.achieved_of_model})  # fmt: skip
    whole, report = lowrank.compress(
        tiny.model, 0.6, of="model", target_modules="all", data=seen, copy=True, progress=False
    )
    ranks = {entry.name: entry.size for entry in report.plan.entries}
    for method in TABLES:
        model = whole
        if method != "head-aware":  # the same ranks, the table by another method
            model = lowrank.apply(
                tiny.model, report.plan.edit({"model.embed_tokens": None}), data=seen, copy=True,
                progress=False,
            )[0]  # fmt: skip
            size = ranks["model.embed_tokens"]
            model, _ = lowrank.compress(
                model, rank=size[0], method=METHODS[method](), data=seen, align=1,
                target_modules=["embed_tokens"], progress=False,
            )  # fmt: skip
        models.append(model)
        found.append({"targets": "all, of model", "method": method, "ratio": 0.6,
                      "kept_of_model": report.achieved_of_model})  # fmt: skip
    judged = judge(models, rows)
    print(f"dense: perplexity {judged[0][0]:.3f}")
    print(f"{'targets':14} {'method':10} {'ratio':>5} {'of model':>8} {'perplexity':>10} {'KL':>8}")
    for row, (perplexity, kl) in zip(found, judged[1:], strict=True):
        row |= {"perplexity": perplexity, "kl": kl}
        print(
            f"{row['targets']:14} {row['method']:10} {row['ratio']:5.1f} "
            f"{row['kept_of_model']:8.4f} {perplexity:10.3f} {kl:8.4f}"
        )
    equal, copies = reloaded(whole)
    print(f"saved, reloaded in a new process, logits equal: {equal}; stored tables: {copies}")
    keep("embeddings", found, tokens=ROWS * LENGTH, logits_equal=equal, stored_tables=copies)


def reloaded(model: torch.nn.Module) -> tuple[bool, list[str]]:
    """Whether another process computes the same logits, and which tensors hold the table."""
    with tempfile.TemporaryDirectory() as folder:
        lowrank.save(model, folder)
        out = str(Path(folder) / "logits.out")
        command = [sys.executable, "-c", RELOAD, folder, out, str(LENGTH)]
        subprocess.run(command, check=True, capture_output=True)
        there = load_file(out)["logits"]
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            names = [n for n in file.keys() if "embed" in n or "lm_head" in n]  # noqa: SIM118
    ids = torch.arange(LENGTH).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        here = model(input_ids=ids).logits
    return torch.equal(here, there), names


if __name__ == "__main__":
    main()
