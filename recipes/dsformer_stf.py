"""A text classifier kept in 0.4 of its bytes and in less: SVD, a fixed support, and STF.

Real text that every Python has: the source of the standard library. A classifier of bags of tokens,
trained here from nothing, says from 64 tokens which of the library's 80 largest modules (tkinter,
turtle, typing, …) they are from; every fourth snippet is held out. The trained net's hidden layers
are then factored three ways at equal stored bytes, indices included, and fine-tuned
on the same batches: low rank by SVD; a dense basis with sparse coefficients (as in DSFormer, arXiv
2312.13211) whose support is fixed; and the same start with STF, which lets the support follow the
task. All three start without data, as DSFormer does. The dense net is trained on for as many steps
too. Each way takes the best of a few learning rates by seed 0.

    python recipes/dsformer_stf.py             # minutes of two cores
    python recipes/dsformer_stf.py --full      # long runs; an hour

DSFormer's own results are for BERT-base on GLUE and SQuAD; no table of it is for this.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

import lowrank
from lowrank.demo import tiny_lm
from lowrank.train import STF

WAYS = ("dense", "SVD", "fixed support", "STF")
LENGTH = 64
LEFT_OUT = {"test", "tests", "encodings", "site-packages", "pydoc_data"}


def texts(modules: int) -> list[tuple[Tensor, Tensor]]:
    """For each of the largest modules: rows of tokens (n, LENGTH) to train on and held out."""
    root, tokenizer = Path(sysconfig.get_path("stdlib")), tiny_lm().tokenizer
    files = [f for f in root.rglob("*.py") if not LEFT_OUT & {*f.relative_to(root).parts}]
    files.sort(key=lambda f: (-f.stat().st_size, str(f)))
    parts = []
    for file in files[:modules]:
        source = file.read_text(encoding="utf-8", errors="ignore")[:40_000]
        tokens = tokenizer(source, verbose=False)["input_ids"]
        rows = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
        held_out = torch.arange(len(rows)) % 4 == 3
        parts.append((rows[~held_out], rows[held_out]))
    return parts


def stacked(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    labels = [torch.full((len(rows),), i) for i, rows in enumerate(parts)]
    return torch.cat(parts), torch.cat(labels)


class Classifier(nn.Module):
    """The mean of the tokens' embeddings, two hidden layers, and a head."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(1024, width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, 2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = gelu(self.second(gelu(self.first(self.table(rows)))))
        return self.head(hidden)  # type: ignore[no-any-return]


def fit(
    model: Any, data: tuple[Tensor, Tensor], steps: int, lr: float, seed: int, batch: int,
    stf: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    rows, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    controller = None if stf is None else STF(model, optimizer, **stf)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    for _ in range(steps):
        some = torch.randint(len(rows), (batch,), generator=generator)
        loss = cross_entropy(model(rows[some]), labels[some])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if controller:
            controller.before_step()
        optimizer.step()
        if controller:
            controller.after_step()
        optimizer.zero_grad()
        schedule.step()
    return (controller.finish() if controller else model).eval()


@torch.no_grad()
def accuracy(model: Any, data: tuple[Tensor, Tensor]) -> float:
    right = [
        (model(rows).argmax(1) == labels).sum()
        for rows, labels in zip(*(part.split(128) for part in data), strict=True)
    ]
    return 100 * float(sum(right)) / len(data[0])


def hidden_bytes(model: Any) -> int:
    """Stored by the two hidden layers, biases left out."""
    tensors = {**model.first.state_dict(prefix="1"), **model.second.state_dict(prefix="2")}
    kept = [t for name, t in tensors.items() if not name.endswith("bias")]
    return sum(t.numel() * t.element_size() for t in kept)


def smaller(
    dense: Any, way: str, keep: float, options: argparse.Namespace
) -> tuple[Any, dict[str, Any] | None]:
    """What is fine-tuned, and the options of its controller."""
    model = copy.deepcopy(dense)
    if way == "dense":
        return model, None
    if way == "SVD":
        done = lowrank.compress(
            model, keep, method="svd", policy="uniform", unit="bytes", align=1, data=None,
            exclude_modules=["head"], progress=False,
        )  # fmt: skip
        return done[0], None
    fixed = way == "fixed support"
    return model, {
        "ratio": keep,
        "density": options.density,
        "exclude_modules": ["head"],
        "every": 10**9 if fixed else options.every,
        "freeze": 1 if fixed else round(options.freeze * options.steps),
    }


def tuned(
    dense: Any, way: str, keep: float, data: Any, lr: float, seed: int, options: argparse.Namespace
) -> tuple[float, int, float]:
    """Accuracy, bytes and seconds of one fine-tuning."""
    model, stf = smaller(dense, way, keep, options)
    begun = time.perf_counter()
    done = fit(model, data[0], options.steps, lr, seed, options.batch, stf)
    seconds = time.perf_counter() - begun
    return accuracy(done, data[1]), hidden_bytes(done), seconds


def compare(dense: list[Any], keep: float, data: Any, options: argparse.Namespace) -> None:
    """One row a way, and who is the best."""
    scores: dict[str, list[float]] = {}
    whole = hidden_bytes(dense[0])
    for way in WAYS if keep == options.keeps[0] else WAYS[1:]:
        tried = [(lr, *tuned(dense[0], way, keep, data, lr, 0, options)) for lr in options.rates]
        lr, first, size, seconds = max(tried, key=lambda one: one[1])
        more = [
            tuned(dense[seed], way, keep, data, lr, seed, options)[0]
            for seed in range(1, options.seeds)
        ]
        scores[way] = [first, *more]
        each = " ".join(f"{one:.2f}" for one in scores[way])
        print(
            f"{way:15}{lr:>12g}{size:12,}{size / whole:12.3f}{statistics.fmean(scores[way]):12.2f}"
            f"{each:>24}{seconds:12.1f}",
            flush=True,
        )
    best = max(WAYS[1:], key=lambda way: statistics.fmean(scores[way]))
    wins = sum(
        max(WAYS[1:], key=lambda way: scores[way][seed]) == best for seed in range(options.seeds)
    )
    print(f"at {keep:g}: {best} is best in the mean, and in {wins} of {options.seeds} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="long runs; an hour")
    parser.add_argument(
        "--keeps", type=float, nargs="+", default=[0.4, 0.1, 0.04], help="bytes of hidden layers"
    )
    parser.add_argument("--modules", type=int, default=80)
    parser.add_argument("--density", type=float, default=0.3, help="s / r")
    parser.add_argument("--every", type=int, default=1, help="steps between choices of the support")
    parser.add_argument("--freeze", type=float, default=0.7, help="share of the steps until then")
    parser.add_argument("--dense-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.full:
        options.dense_steps, options.steps, options.seeds = 3000, 2000, 5
        options.rates = [3e-4, 1e-3, 3e-3]
    parts = texts(options.modules)
    train, test = (stacked([pair[i] for pair in parts]) for i in (0, 1))
    common = 100 * max(len(pair[1]) for pair in parts) / len(test[0])
    print(
        f"{len(parts)} modules, {len(train[0]):,} snippets of {LENGTH} tokens to train on and "
        f"{len(test[0]):,} held out; the commonest is {common:.1f} % of these"
    )
    dense = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        model = Classifier(len(parts), options.width)
        dense.append(fit(model, train, options.dense_steps, 3e-3, seed, options.batch))
    before = " ".join(f"{accuracy(model, test):.2f}" for model in dense)
    print(f"accuracy of the dense nets before fine-tuning, %: {before}")
    heads = ("rate", "bytes", "share", "accuracy %", "of each seed", "s")
    print(f"{'':15}" + "".join(f"{h:>{24 if 'seed' in h else 12}}" for h in heads))
    for keep in options.keeps:
        compare(dense, keep, (train, test), options)


if __name__ == "__main__":
    main()
