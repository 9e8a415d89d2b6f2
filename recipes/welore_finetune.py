"""WeLore (VITA-Group): is it enough to fine-tune the layers that became low-rank?

The embedded Llama is compressed to 0.7 of its linear weights, ranks by WeLore's threshold. Layers
that the break-even gate factors are LRC, those that it leaves dense are N-LRC. At half size, as in
the paper, none would be left: this model's spectra are much alike. Factors are whitened on the text
that is trained on; plain SVD (--method svd), as in the paper, leaves a small model further away
than fine-tuning can bring it back. From one start, with the same batches, are trained: the LRC
alone (norms too, as in the authors' code), everything, and the N-LRC alone (norms too).

    python recipes/welore_finetune.py               # under five minutes of two cores
    python recipes/welore_finetune.py --seeds 3     # under ten
    python recipes/welore_finetune.py --steps 10 --seeds 1

Batches are drawn from the embedded calibration text, perplexity is that of every third row of the
embedded held-out text; the model saw neither when it was trained. Memory is counted: bytes of all
parameters, of the gradients and of the optimizer's state, after a step; activations are left out.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from lowrank.demo import LENGTH, held_out_rows, judge, tiny_lm
from lowrank.nn import is_factored

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import keep

PAPER = (
    "Finetuning a 50 % compressed LLaMA-2 7B via LRCs only can outperform full FT with ~3x "
    "throughput and ~0.6x GPU memory (README of VITA-Group/welore and abstract, version 1)"
)
COLUMNS = ("loss", "perplexity", "trained", "optimizer_bytes", "memory_bytes", "tokens_per_s")
WAYS = ("LRC", "full", "N-LRC")
FORMATS = (".4f", ".2f", ",.0f", ",.0f", ",.0f", ",.0f")


def chosen(model: nn.Module, what: str) -> list[nn.Parameter]:
    """What is trained; all else is frozen."""
    if what == "LRC":
        return lowrank.lrc_parameters(model, norms=True)
    if what == "full":
        return list(model.requires_grad_(True).parameters())
    inside = {id(p) for m in model.modules() if is_factored(m) for p in m.parameters()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    dense = [
        p
        for m in model.modules()
        if (isinstance(m, nn.Linear) and m is not head) or "norm" in type(m).__name__.lower()
        for p in m.parameters(recurse=False)
        if id(p) not in inside
    ]
    model.requires_grad_(False)
    return [p.requires_grad_() for p in dense]


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class Run:
    """One model in training."""

    def __init__(self, start: nn.Module, what: str, steps: int, lr: float) -> None:
        self.model: Any = copy.deepcopy(start).train()
        self.trained = chosen(self.model, what)
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0)
        warm = max(steps // 10, 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * step / steps)),
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.optimizer_bytes = self.memory_bytes = 0

    def step(self, rows: Tensor) -> None:
        begun = time.perf_counter()
        logits = self.model(input_ids=rows[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begun)
        state = (t for each in self.optimizer.state.values() for t in each.values())
        self.optimizer_bytes = bytes_of(state)
        parameters = list(self.model.parameters())
        self.memory_bytes = bytes_of(parameters) + bytes_of(p.grad for p in parameters)
        self.memory_bytes += self.optimizer_bytes
        self.optimizer.zero_grad()
        self.schedule.step()
        self.losses.append(loss.item())

    def found(self, tokens: int) -> dict[str, float]:
        """Cost and, as the loss, the mean of the last tenth of the steps."""
        return {
            "loss": statistics.fmean(self.losses[-max(len(self.losses) // 10, 1) :]),
            "trained": sum(p.numel() for p in self.trained),
            "optimizer_bytes": self.optimizer_bytes,
            "memory_bytes": self.memory_bytes,
            "tokens_per_s": tokens / statistics.median(self.seconds),
        }


def together(
    start: nn.Module, stream: Tensor, rows: list[Tensor], seed: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The three ways on the same batches, in turns, so that a busy machine is fair to all."""
    runs = {what: Run(start, what, arguments.steps, arguments.lr) for what in WAYS}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(arguments.steps):
        starts = torch.randint(len(stream) - LENGTH, (arguments.batch,), generator=generator)
        batch = torch.stack([stream[s : s + LENGTH + 1] for s in starts])
        for run in runs.values():
            run.step(batch)
    judged = judge([run.model.eval() for run in runs.values()], rows)
    full = runs["full"].seconds
    return [
        {
            "what": what,
            "seed": seed,
            "perplexity": perplexity,
            "speed_to_full": statistics.median(
                a / b for a, b in zip(full, run.seconds, strict=True)
            ),
            **run.found(arguments.batch * LENGTH),
        }
        for (what, run), (perplexity, _) in zip(runs.items(), judged, strict=True)
    ]


def row(name: str, found: dict[str, float]) -> str:
    cells = (format(found[key], spec) for key, spec in zip(COLUMNS, FORMATS, strict=True))
    return f"{name:12}" + "".join(f"{cell:>16}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--method", default="whitened", choices=["whitened", "svd"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tiny = tiny_lm()
    stream = torch.tensor(tiny.tokenizer(tiny.calibration, verbose=False)["input_ids"])
    rows = held_out_rows(tiny)[::3]
    read = list(stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH).split(16))
    start, report = lowrank.compress(
        tiny.model, arguments.ratio, method=arguments.method, policy="welore",
        data=read if arguments.method == "whitened" else None, copy=True, progress=False,
    )  # fmt: skip
    lrc = sum(map(is_factored, start.modules()))
    dense = sum(entry.target and entry.size is None for entry in report.plan.entries)
    (before, _), (after, _) = judge([tiny.model, start], rows)
    print(f"{lrc} layers are LRC, {dense} N-LRC; {len(stream):,} tokens of text")
    if not dense:
        print("no layer is N-LRC here: what is called so below trains the norms alone")
    print(
        f"held-out perplexity: dense {before:.2f}, compressed to {report.achieved:.3f} {after:.2f}"
    )
    print(f"\n{'trained':12}" + "".join(f"{name:>16}" for name in COLUMNS))
    found: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for one in together(start, stream, rows, seed, arguments):
            found.append(one)
            print(row(f"{one['what']}, {seed}", one), flush=True)
    ratios = summary(found)
    print(f"\nthe paper: {PAPER}")
    print(
        "(there on a GPU; what full fine-tuning starts from is not said there: here the same model)"
    )
    if arguments.write:
        keep(
            "welore_finetune", found, arguments.seeds - 1, settings=vars(arguments), paper=PAPER,
            lrc_layers=lrc, other_layers=dense, achieved=report.achieved, perplexity_dense=before,
            perplexity_compressed=after, ratios=ratios,
        )  # fmt: skip


def summary(found: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Means over the seeds, and the ratio to full fine-tuning per seed (mean, least, most)."""
    ratios: dict[str, dict[str, list[float]]] = {}
    by = {(one["what"], one["seed"]): one for one in found}
    seeds = sorted({one["seed"] for one in found})
    print()
    for what in WAYS:
        means = {key: statistics.fmean(by[what, seed][key] for seed in seeds) for key in COLUMNS}
        print(row(f"{what}, mean", means))
    print()
    for what in ("LRC", "N-LRC"):
        ratios[what] = {}
        for key in COLUMNS:
            each = [by[what, seed][key] / by["full", seed][key] for seed in seeds]
            if key == "tokens_per_s":  # within the pairs of steps
                each = [by[what, seed]["speed_to_full"] for seed in seeds]
            ratios[what][key] = [statistics.fmean(each), min(each), max(each)]
        cells = (f"{m:.3f} [{a:.2f},{b:.2f}]" for m, a, b in ratios[what].values())
        print(f"{what + '/full':12}" + "".join(f"{cell:>18}" for cell in cells))
    return ratios


if __name__ == "__main__":
    main()
