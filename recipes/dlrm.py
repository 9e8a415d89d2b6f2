"""Embeddings of a recommender in a quarter and a sixteenth of their numbers: which form is best?

A small net like DLRM (arXiv 1906.00091): a table for every categorical feature, and a perceptron
over what they give. The bed is real text that every Python has, the source of the standard library:
from the module, the last token, the last two and the last three (tables of up to tens of thousands
of rows, read as unevenly as any recommender's) the net says which of 80 tokens comes next. Every
fifth stretch of 200 tokens is held out. The table of modules, of 81 rows, stays as it is.

Each form is trained from the start, on the batches of the full tables. Low rank, plain or weighted
by frequency, and tables by quotient and remainder are also fitted to the full tables after
training, and tuned for a third of the steps more.

    python recipes/dlrm.py             # two minutes of two cores
    python recipes/dlrm.py --seeds 3
"""

from __future__ import annotations

import argparse
import re
import statistics
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowrank
from lowrank import METHODS

LEFT_OUT = {"test", "tests", "encodings", "site-packages", "pydoc_data", "idlelib", "lib2to3"}
TOKEN = re.compile(r"\n *|\w+|[^\w\s]")
CLASSES, WIDTH, BATCH, RATE = 80, 16, 1024, 0.02
TABLES = ["tables.1", "tables.2", "tables.3"]  # the first has a row for each of 80 modules
SIZES = {"1/4": 0.26, "1/16": 0.065}  # factors of whole rank 4 and 1 are a little more than that
Data = tuple[Tensor, Tensor]


def samples(characters: int) -> tuple[Data, Data]:
    """(ids (n, 4), next tokens (n,)) to train on and held out; id 0 is seldom or never seen."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in root.rglob("*.py") if not LEFT_OUT & {*f.relative_to(root).parts}]
    files.sort(key=lambda f: (-f.stat().st_size, str(f)))
    texts = [f.read_text(encoding="utf-8", errors="ignore")[:characters] for f in files[:80]]
    words = [TOKEN.findall(text) for text in texts]
    common = Counter(word for text in words for word in text).most_common(CLASSES - 1)
    classes = {word: number for number, (word, _) in enumerate(common)}
    rows: list[tuple[Hashable, ...]] = []
    labels, kept = [], []
    for module, text in enumerate(words):
        for i in range(3, len(text)):
            rows.append((module, text[i - 1], tuple(text[i - 2 : i]), tuple(text[i - 3 : i])))
            labels.append(classes.get(text[i], CLASSES - 1))
            kept.append(i // 200 % 5 < 4)
    columns = []
    for values in zip(*rows, strict=True):
        counts = Counter(v for v, train in zip(values, kept, strict=True) if train)
        often = (value for value, count in counts.most_common() if count > 1)
        ids = {value: number for number, value in enumerate(often, 1)}
        columns.append(torch.tensor([ids.get(value, 0) for value in values]))
    ids, wanted, train = torch.stack(columns, 1), torch.tensor(labels), torch.tensor(kept)
    return (ids[train], wanted[train]), (ids[~train], wanted[~train])


class Net(nn.Module):
    """A table for each feature and two layers."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, WIDTH) for count in rows)
        self.top = nn.Sequential(
            nn.Linear(WIDTH * len(rows), 96), nn.ReLU(), nn.Linear(96, CLASSES)
        )
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        found = [table(column) for table, column in zip(self.tables, ids.T, strict=True)]
        return self.top(torch.cat(found, 1))  # type: ignore[no-any-return]


def fit(net: Any, data: Data, steps: int, lr: float, seed: int) -> Any:
    ids, labels = data
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(ids), (BATCH,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(net(ids[some]), labels[some]).backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def log_loss(net: Any, data: Data) -> float:
    return float(cross_entropy(net(data[0]), data[1]))


def starts(ratio: float, seed: int) -> dict[str, Callable[[Net], Any]]:
    """Forms made before training: net -> (net, report)."""
    halves = METHODS["quotient-remainder"]

    def by_design(**options: Any) -> Callable[[Net], Any]:
        return lambda net: lowrank.factorize_by_design(
            net, ratio, target_modules=TABLES, seed=seed, **options
        )

    def unified(lookups: int) -> Callable[[Net], Any]:
        return lambda net: lowrank.unify_tables(
            net, ratio, target_modules=TABLES, lookups=lookups, seed=seed
        )

    return {
        "low rank": by_design(),
        "mixed dimensions": by_design(policy="mixed-dimensions"),
        "quotient-remainder": by_design(method=halves(start="random", seed=seed)),
        "the same, concat": by_design(method=halves(op="concat", start="random", seed=seed)),
        "unified, 4 look-ups": unified(4),
        "unified, 2 look-ups": unified(2),
        "hashing (1 look-up)": unified(1),
    }


def fitted(ratio: float, ids: Tensor) -> dict[str, Callable[[Net], Any]]:
    """Forms fitted to the tables of a trained net."""

    def compressed(method: str, data: Any = None) -> Callable[[Net], Any]:
        return lambda net: lowrank.compress(
            net, ratio, method=method, policy="uniform", data=data, target_modules=TABLES,
            copy=True, progress=False,
        )  # fmt: skip

    return {
        "low rank, fitted": compressed("svd"),
        "by frequency, fitted": compressed("frequency", list(ids[: 64 * BATCH].split(BATCH))),
        "quotient-remainder, fitted": compressed("quotient-remainder"),
    }


Losses = dict[tuple[str, str], list[float]]


def run(data: tuple[Data, Data], rows: list[int], seed: int, steps: int, losses: Losses) -> None:
    """Append the held-out log-loss of every form at every size."""
    train, held_out = data

    def fresh() -> Net:
        torch.manual_seed(seed)
        return Net(rows)

    def note(form: str, size: str, net: Any) -> None:
        losses.setdefault((form, size), []).append(log_loss(net, held_out))

    full = fit(fresh(), train, steps, RATE, seed)
    note("full tables", "1", full)
    for size, ratio in SIZES.items():
        for form, make in starts(ratio, seed).items():
            net, _ = make(fresh())
            note(form, size, fit(net, train, steps, RATE, seed))
        for form, make in fitted(ratio, train[0]).items():
            net, _ = make(full)
            note(form, size, net)
            note(f"{form}, tuned", size, fit(net, train, steps // 3, RATE / 2, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--characters", type=int, default=16_000, help="of each module")
    given = parser.parse_args()
    started = time.perf_counter()
    train, held_out = samples(given.characters)
    rows = [int(column.max()) + 1 for column in torch.cat([train[0], held_out[0]]).T]
    numbers = WIDTH * sum(rows[1:])
    print(f"{len(train[0]):,} rows to train on, {len(held_out[0]):,} held out")
    print(f"tables of {rows[1:]} rows, {numbers:,} numbers")
    losses: Losses = {}
    for seed in range(given.seeds):
        run((train, held_out), rows, seed, given.steps, losses)
    print(f"full tables: {statistics.mean(losses.pop(('full tables', '1'))):.3f}")
    print(f"{'held-out log-loss':38}" + "".join(f"{size:>8}" for size in SIZES))
    best = {s: min(statistics.mean(v) for (_, z), v in losses.items() if z == s) for s in SIZES}
    for form in dict.fromkeys(form for form, _ in losses):
        means = [statistics.mean(losses[form, size]) for size in SIZES]
        marks = ["*" if m == best[s] else " " for m, s in zip(means, SIZES, strict=True)]
        print(f"{form:38}" + "".join(f"{m:7.3f}{k}" for m, k in zip(means, marks, strict=True)))
    for size in SIZES:
        first = min((statistics.mean(v), form) for (form, z), v in losses.items() if z == size)
        print(f"best at {size}: {first[1]}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
