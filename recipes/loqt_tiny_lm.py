"""LoQT on a small Llama trained from nothing: quality beside the bytes that training takes.

The architecture of the embedded model is trained on the source of Python's standard library (see
train_tiny_lm.py): dense, by LoQT (arXiv 2405.16528), and factored by design at the same rank. All
three see the same batches and use AdamW, each with the best of a few learning rates. Bytes are
counted from tensors: all parameters and buffers, gradients as they are before a step, at their
peak, and the optimizer's state; activations are left out.

    python recipes/loqt_tiny_lm.py             # minutes
    python recipes/loqt_tiny_lm.py --full      # the authors' rank-to-width ratio, long; hours

The paper trains Llamas of 60 million parameters and more in bfloat16; no table of it is for a model
of this size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from python_text import Text, draws, next_token, read
from torch import Tensor, nn
from train_tiny_lm import new_model

import lowrank
from lowrank.demo import judge, tiny_lm
from lowrank.train import LoQT

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep

WAYS = ("dense", "LoQT", "by design")


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def gathered(controller: LoQT | None) -> list[Tensor | None]:
    """Full gradients that LoQT gathers in the steps that merge a layer."""
    return [layer.gathered for layer in controller.layers.values()] if controller else []


def train(way: str, text: Text, lr: float, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    model: Any = new_model(text.end)
    if way == "by design":
        model, _ = lowrank.factorize_by_design(model, options.ratio, align=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    controller = None
    if way == "LoQT":
        controller = LoQT(model, optimizer, rank=options.rank, gap=options.gap)
    steps = options.steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=max(0.1, 2 / steps), cycle_momentum=False
    )
    losses, seconds, peak = [], [], 0
    for rows in draws(text, steps, options.batch, options.length, options.seed):
        begun = time.perf_counter()
        loss = next_token(model, rows)
        loss.backward()
        held = [*model.parameters(), *model.buffers(), *gathered(controller)]
        held += [p.grad for p in model.parameters()]
        held += [t for state in optimizer.state.values() for t in state.values()]
        peak = max(peak, bytes_of(held))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if controller:
            controller.before_step()
        optimizer.step()
        if controller:
            controller.after_step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - begun)
        losses.append(loss.item())
    last = [*model.parameters(), *model.buffers()]
    held_bytes = bytes_of(last)
    model = controller.finish() if controller else model
    return {
        "model": model.eval(), "loss": statistics.fmean(losses[-max(steps // 10, 1) :]),
        "weight_bytes": held_bytes, "peak_bytes": peak, "step_s": statistics.median(seconds),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="long runs; hours")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gap", type=int, default=20)
    parser.add_argument("--ratio", type=float, default=0.5, help="kept by design: rank 32 of 128")
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 1e-2])
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.full:
        options.steps, options.batch, options.length, options.gap = 8000, 32, 256, 100
        options.rates, options.documents = [2e-3, 4e-3, 1e-2, 2e-2], 10**6
    text = read(tiny_lm(), options.documents)
    seen = options.steps * options.batch * options.length
    print(f"{len(text.stream):,} tokens of text; {options.steps} steps read {seen:,}")
    heads = ("rate", "loss", "perplexity", "weights, bytes", "peak, bytes", "to dense", "step, ms")
    print(f"{'':10}" + "".join(f"{head:>15}" for head in heads))
    dense, found = 0, []
    for way in WAYS:
        best: dict[str, Any] = {}
        for lr in options.rates:
            tried = {**train(way, text, lr, options), "lr": lr}
            best = tried if not best or tried["loss"] < best["loss"] else best
        dense = dense or best["peak_bytes"]
        ((perplexity, _),) = judge([best["model"]], text.held_out)
        print(
            f"{way:10}{best['lr']:15g}{best['loss']:15.3f}{perplexity:15.2f}"
            f"{best['weight_bytes']:15,}{best['peak_bytes']:15,}"
            f"{best['peak_bytes'] / dense:15.3f}{1000 * best['step_s']:15.0f}",
            flush=True,
        )
        del best["model"]
        found.append({"way": way, "perplexity": perplexity, **best})
    if options.write:
        keep("loqt_tiny_lm", found, options.seed, settings=vars(options), gallery=shown(found))


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """LoQT's figure, with dense training and factors by design beside it."""
    by = {row["way"]: row for row in rows}
    beside = ", ".join(
        f"{way} {row['perplexity']:.0f} at {row['peak_bytes'] / by['dense']['peak_bytes']:.2f}"
        for way, row in by.items() if way != "LoQT"
    )  # fmt: skip
    return [
        figure(
            "controllers", "LoQT", "a Llama of the embedded model's shape, from nothing",
            f"bytes that training takes ({beside})",
            by["LoQT"]["peak_bytes"] / by["dense"]["peak_bytes"], "held-out perplexity",
            by["LoQT"]["perplexity"],
        )
    ]  # fmt: skip


if __name__ == "__main__":
    main()
