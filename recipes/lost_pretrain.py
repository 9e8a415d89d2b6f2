"""A small Llama trained from nothing: dense, low rank, and LOST with two choices of channels.

The architecture of the embedded model is trained on the source of Python's standard library (see
train_tiny_lm.py), five ways on the same batches: dense; low-rank factors alone, at as many numbers
as LOST has; the same with their product scaled by LOST's γ, for γ alone does much in short runs;
LOST (arXiv 2508.02668, `lowrank.train.lost`) with random channels; LOST with the channels of the
tail. AdamW, the best of a few learning rates for each way (by seed 0).
The loss is that of held-out modules of the library. Optimizer bytes are those of its state.

    python recipes/lost_pretrain.py                # under five minutes of one core
    python recipes/lost_pretrain.py --seeds 3      # under ten
    python recipes/lost_pretrain.py --silu         # SiLU between the factors, in all but dense
    python recipes/lost_pretrain.py --full         # long runs; hours

Who leads depends on the length: the lead of low rank with γ is gone by 1500 steps. In a quarter of
an hour of one core, with rates that were chosen in runs of 300 steps:

    python recipes/lost_pretrain.py --steps 1500 --choose 300 --seeds 1 --documents 250 \\
        --rates 2e-3 4e-3 --ways dense "low rank, γ" LOST

The paper trains Llamas of 60 million parameters and more on C4; no table of it is for this size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from python_text import Text, draws, held_out_loss, next_token, read
from torch import nn
from train_tiny_lm import new_model

import lowrank
from lowrank.demo import tiny_lm
from lowrank.nn import LowRankSparseLinear
from lowrank.train import lost

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import keep

COLUMNS = ("rate", "loss", "of each seed", "parameters", "state, bytes", "tokens/s")
WAYS = ("dense", "low rank", "low rank, γ", "LOST, random", "LOST")


def built(way: str, end: int, seed: int, options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(seed)
    model: Any = new_model(end)
    if way == "dense":
        return model  # type: ignore[no-any-return]
    kept = {"gamma": options.gamma, "act": "silu" if options.silu else None}
    if way.startswith("LOST"):
        channels: Any = "random" if "random" in way else "tail"
        sizes = options.rank, options.sparsity
        return lost(model, *sizes, channels=channels, seed=seed, **kept)[0]
    meant, _ = lost(model, options.rank, options.sparsity, copy=True)
    layers = {n: m for n, m in meant.named_modules() if isinstance(m, LowRankSparseLinear)}
    ranks = {n: m.cost().params // (m.in_features + m.out_features) for n, m in layers.items()}
    if way == "low rank" and not options.silu:
        done = lowrank.compress(
            model, rank_pattern=ranks, method="svd", data=None, align=1, progress=False
        )
        return done[0]
    kept["gamma"] = 1.0 if way == "low rank" else options.gamma
    for name, rank in ranks.items():  # one channel, which has no part in it
        model, _ = lost(model, rank, 1e-9, target_modules=[name], **kept)
        nn.init.zeros_(model.get_submodule(name).sparse.weight).requires_grad_(False)
    return model  # type: ignore[no-any-return]


def train(
    way: str, text: Text, lr: float, seed: int, steps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One run: its held-out loss and what it took."""
    model = built(way, text.end, seed, options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    begun = time.perf_counter()
    for rows in draws(text, steps, options.batch, options.length, seed):
        next_token(model, rows).backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - begun
    state = [t for each in optimizer.state.values() for t in each.values()]
    return {
        "way": way,
        "steps": steps,
        "seed": seed,
        "lr": lr,
        "loss": held_out_loss(model, text),
        "params": sum(p.numel() for p in trained),
        "state_bytes": sum(t.numel() * t.element_size() for t in state),
        "tokens_s": steps * options.batch * options.length / seconds,
    }


def compare(way: str, text: Text, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the row of one way: the best rate by seed 0, then all seeds at it. Returns all runs."""
    choose = options.choose or options.steps
    tried = [train(way, text, lr, 0, choose, options) for lr in options.rates]
    lr = min(tried, key=lambda run: run["loss"])["lr"]
    runs = [run for run in tried if run["lr"] == lr and choose == options.steps]
    for seed in range(len(runs), options.seeds):
        runs.append(train(way, text, lr, seed, options.steps, options))
    each = " ".join(f"{run['loss']:.3f}" for run in runs)
    loss = statistics.fmean(run["loss"] for run in runs)
    speed = statistics.median(run["tokens_s"] for run in runs)
    print(
        f"{way:14}{lr:14g}{loss:14.3f}{each:>24}"
        f"{runs[0]['params']:14,}{runs[0]['state_bytes']:14,}{speed:14,.0f}",
        flush=True,
    )
    return [*(run for run in tried if run not in runs), *runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="long runs; hours")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--choose", type=int, help="steps of the runs that choose the rate")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rank", type=int, default=32, help="a quarter of the width, as there")
    parser.add_argument("--sparsity", type=float, default=0.05)
    parser.add_argument("--gamma", type=float, default=0.5)
    parser.add_argument("--silu", action="store_true", help="SiLU between the factors")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.full:
        options.steps, options.batch, options.length = 8000, 32, 256
        options.rates, options.documents = [1e-3, 2e-3, 4e-3, 1e-2], 10**6
    text = read(tiny_lm(), options.documents)
    seen = options.steps * options.batch * options.length
    print(f"{len(text.stream):,} tokens of text; {options.steps} steps read {seen:,}")
    print(f"{'':14}" + "".join(f"{h:>{24 if 'seed' in h else 14}}" for h in COLUMNS), flush=True)
    runs = [run for way in options.ways for run in compare(way, text, options)]
    if options.write:
        name = f"lost_pretrain_{options.steps}" + ("_silu" if options.silu else "")
        keep(name, runs, options.seeds - 1, settings=vars(options), tokens=len(text.stream))


if __name__ == "__main__":
    main()
