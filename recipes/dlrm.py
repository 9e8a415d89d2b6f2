"""Embeddings of a recommender in a quarter and a sixteenth of their numbers: which form is best?

A small net like DLRM (arXiv 1906.00091): a table for every categorical feature, and a perceptron
over what they give. There are two beds:

text    real text that every Python has, the source of the standard library: from the module, the
        last token, the last two and the last three (tables of up to tens of thousands of rows, read
        as unevenly as any recommender's) the net says which of 80 tokens comes next. Every fifth
        stretch of 200 tokens is held out.
clicks  drawn: ids by Zipf's law, and clicks by a teacher, the inner products of whose rows are the
        logit. Its tables have rank 4, so that a quarter of the numbers is enough for low rank.

In both ids are sorted by frequency, as far as it is known, and the smallest table stays as it is.

Most forms are trained from the start, on the batches of the full tables. Low rank, plain, weighted
by frequency and aware of the head, tables by quotient and remainder, and tensor trains are also
fitted to the full tables after training, and tuned for a third of the steps more. DNIS has dense
tables with gates for half of the steps, which learn from a tenth of the rows to train on.

    python recipes/dlrm.py             # both beds, one seed: under five minutes of two cores
    python recipes/dlrm.py --bed text --seeds 3
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import lowrank
from lowrank import METHODS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep

LEFT_OUT = {"test", "tests", "encodings", "site-packages", "pydoc_data", "idlelib", "lib2to3"}
TOKEN = re.compile(r"\n *|\w+|[^\w\s]")
CLASSES, WIDTH, BATCH, RATE = 80, 16, 1024, 0.02
TABLES = ["tables.1", "tables.2", "tables.3"]  # the first is small
SIZES = {"1/4": 0.26, "1/16": 0.065}  # factors of whole rank 4 and 1 are a little more than that
CLICKS, ZIPF_ROWS, EXPONENT, TEACHER_RANK = 250_000, (50, 1_000, 6_000, 20_000), 1.2, 4
# Whose figures they are in the gallery.
GALLERY = {
    "low rank": [("forms", "LowRankEmbedding")],
    "mixed dimensions": [("policies", "mixed-dimensions")],
    "quotient-remainder": [
        ("methods", "quotient-remainder"),
        ("forms", "QuotientRemainderEmbedding"),
    ],
    "tensor train": [("methods", "tensor-train"), ("forms", "TensorTrainEmbedding")],
    "unified, 4 look-ups": [("forms", "UnifiedEmbedding"), ("forms", "UnifiedReader")],
    "DNIS": [("controllers", "DNIS"), ("forms", "BlockEmbedding")],
    "by frequency": [("methods", "frequency")],
    "head-aware": [("methods", "head-aware")],
}
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


def clicks(count: int, seed: int = 7) -> tuple[Data, Data, float]:
    """As `samples`, with labels 0 and 1, and the held-out log-loss of the teacher itself."""
    rng = torch.Generator().manual_seed(seed)
    columns, vectors = [], []
    for feature, rows in enumerate(ZIPF_ROWS):
        chance = torch.arange(3, rows + 3, dtype=torch.float64).pow(-EXPONENT)
        ids = torch.multinomial(chance, count, replacement=True, generator=rng)
        table = torch.randn(rows, TEACHER_RANK, generator=rng)
        table[:, 0] += (-1) ** feature  # so that ids matter by themselves too
        columns.append(ids)
        vectors.append(table[ids])
    logits = sum((a * b).sum(1) for a, b in combinations(vectors, 2)) * 0.5
    labels = (torch.rand(count, generator=rng) < logits.sigmoid()).long()
    ids, train = torch.stack(columns, 1), count * 4 // 5
    best = binary_cross_entropy_with_logits(logits[train:], labels[train:].float())
    return (ids[:train], labels[:train]), (ids[train:], labels[train:]), float(best)


class Net(nn.Module):
    """A table for each feature and two layers; with `products`, inner products of all pairs too."""

    def __init__(self, rows: list[int], classes: int, products: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, WIDTH) for count in rows)
        self.products = products
        inputs = WIDTH * len(rows) + products * len(rows) * (len(rows) - 1) // 2
        self.top = nn.Sequential(nn.Linear(inputs, 96), nn.ReLU(), nn.Linear(96, classes))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        found = [table(column) for table, column in zip(self.tables, ids.T, strict=True)]
        pairs = combinations(found, 2) if self.products else ()
        products = [(a * b).sum(1, keepdim=True) for a, b in pairs]
        return self.top(torch.cat([*found, *products], 1))  # type: ignore[no-any-return]


Attach = Callable[[nn.Module, Any], Any]  # net, optimizer -> controller


def fit(
    net: Any, data: Data, steps: int, lr: float, seed: int, attach: Attach | None = None
) -> Any:
    ids, labels = data
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    controller = attach(net, optimizer) if attach else None
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        some = torch.randint(len(ids), (BATCH,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(net(ids[some]), labels[some]).backward()
        if controller:
            controller.before_step()
        optimizer.step()
        if controller:
            controller.after_step()
        schedule.step()
    return controller.finish() if controller else net


def starts(ratio: float, seed: int) -> dict[str, Callable[[Net], Any]]:
    """Forms made before training: net -> (net, report)."""
    tables, trains = METHODS["quotient-remainder"], METHODS["tensor-train"]

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
        "quotient-remainder": by_design(method=tables(start="random", seed=seed)),
        "the same, concat": by_design(method=tables(op="concat", start="random", seed=seed)),
        "tensor train": by_design(method=trains(start="random", seed=seed)),
        "unified, 4 look-ups": unified(4),
        "unified, 2 look-ups": unified(2),
        "hashing (1 look-up)": unified(1),
    }


def fitted(ratio: float, ids: Tensor) -> dict[str, Callable[[Net], Any]]:
    """Forms fitted to the tables of a trained net."""
    some = list(ids[: 64 * BATCH].split(BATCH))

    def compressed(method: str, data: Any = None) -> Callable[[Net], Any]:
        return lambda net: lowrank.compress(
            net, ratio, method=method, policy="uniform", data=data, target_modules=TABLES,
            copy=True, progress=False,
        )  # fmt: skip

    return {
        "low rank, fitted": compressed("svd"),
        "by frequency, fitted": compressed("frequency", some),
        "head-aware, fitted": compressed("head-aware", some),  # no table is tied to a head here
        "quotient-remainder, fitted": compressed("quotient-remainder"),
        "tensor train, fitted": compressed("tensor-train"),
    }


def dnis(net: Net, train: Data, ratio: float, steps: int, seed: int) -> Any:
    """The net after gates and training; every tenth stretch of rows is for the gates."""
    gated = torch.arange(len(train[0])) // 200 % 10 == 0
    held_back = train[0][gated], train[1][gated]
    rng = torch.Generator().manual_seed(seed)

    def validate(model: Any) -> Tensor:
        some = torch.randint(len(held_back[0]), (BATCH,), generator=rng)
        return cross_entropy(model(held_back[0][some]), held_back[1][some])

    def attach(model: nn.Module, optimizer: Any) -> Any:
        return lowrank.train.DNIS(
            model, optimizer, ratio=ratio, search=steps // 2, validate=validate,
            target_modules=TABLES,
        )  # fmt: skip

    return fit(net, (train[0][~gated], train[1][~gated]), steps, RATE, seed, attach)


Figures = dict[tuple[str, str], list[tuple[float, float]]]  # form, size -> log-loss, share kept


@dataclass
class Bed:
    """Rows to train on and held out, and a net for them."""

    title: str
    train: Data
    held_out: Data
    classes: int
    products: bool

    def __post_init__(self) -> None:
        every = torch.cat([self.train[0], self.held_out[0]])
        self.rows = [int(column.max()) + 1 for column in every.T]
        self.numbers = WIDTH * sum(self.rows[1:])
        self.figures: Figures = {}

    def fresh(self, seed: int) -> Net:
        torch.manual_seed(seed)
        return Net(self.rows, self.classes, self.products)

    @torch.no_grad()
    def note(self, form: str, size: str, net: Any) -> None:
        loss = float(cross_entropy(net(self.held_out[0]), self.held_out[1]))
        kept = sum(p.numel() for p in net.tables[1:].parameters())
        self.figures.setdefault((form, size), []).append((loss, kept / self.numbers))

    def run(self, seed: int, steps: int) -> None:
        """Note the held-out log-loss of every form at every size."""
        full = fit(self.fresh(seed), self.train, steps, RATE, seed)
        self.note("full tables", "1", full)
        for size, ratio in SIZES.items():
            for form, make in starts(ratio, seed).items():
                net, _ = make(self.fresh(seed))
                self.note(form, size, fit(net, self.train, steps, RATE, seed))
            self.note("DNIS", size, dnis(self.fresh(seed), self.train, ratio, steps, seed))
            for form, make in fitted(ratio, self.train[0]).items():
                net, _ = make(full)
                self.note(form, size, net)
                net = fit(net, self.train, steps // 3, RATE / 2, seed)
                self.note(f"{form}, tuned", size, net)

    def show(self) -> None:
        print(f"\n{self.title}")
        print(f"{len(self.train[0]):,} rows to train on, {len(self.held_out[0]):,} held out; "
              f"tables of {self.rows[1:]} rows, {self.numbers:,} numbers")  # fmt: skip
        means = {key: [statistics.mean(v) for v in zip(*found, strict=True)]
                 for key, found in self.figures.items()}  # fmt: skip
        print(f"full tables: {means.pop(('full tables', '1'))[0]:.3f}")
        print(f"{'held-out log-loss, share kept':34}" + "".join(f"{size:>16}" for size in SIZES))
        best = {size: min((v[0], form) for (form, z), v in means.items() if z == size)
                for size in SIZES}  # fmt: skip
        for form in dict.fromkeys(form for form, _ in means):
            cells = [(*means[form, size], best[size][1] == form) for size in SIZES]
            line = "".join(f"{v:9.3f}{'*' if b else ' '}{k:6.3f}" for v, k, b in cells)
            print(f"{form:34}{line}")
        for size, (loss, form) in best.items():
            print(f"best at {size}: {form}, {loss:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bed", choices=["text", "clicks"], help="one alone")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--characters", type=int, default=16_000, help="of each module")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    given = parser.parse_args()
    started = time.perf_counter()
    beds = []
    if given.bed != "clicks":
        text = samples(given.characters)
        beds.append(Bed("text: the next of 80 tokens", *text, CLASSES, products=False))
    if given.bed != "text":
        *drawn, least = clicks(CLICKS)
        title = f"clicks: the teacher itself has {least:.3f}"
        beds.append(Bed(title, *drawn, 2, products=True))
    for bed in beds:
        for seed in range(given.seeds):
            bed.run(seed, given.steps)
        bed.show()
    print(f"{time.perf_counter() - started:.0f} s")
    if given.write:
        rows = [
            {"bed": bed.title, "form": form, "size": size, "loss": loss, "kept": kept, "seed": seed}
            for bed in beds for (form, size), found in bed.figures.items()
            for seed, (loss, kept) in enumerate(found)
        ]  # fmt: skip
        keep("dlrm", rows, given.seeds - 1, settings=vars(given), gallery=shown(beds, given.seeds))


def shown(beds: list[Bed], seeds: int) -> list[dict[str, Any]]:
    """Means of every name of the gallery, with full tables and low rank in the setting."""
    made = []
    for bed in beds:
        means = {key: [statistics.fmean(v) for v in zip(*found, strict=True)]
                 for key, found in bed.figures.items()}  # fmt: skip
        model = f"a recommender's net, {bed.title.partition(':')[0]}"
        plain = " / ".join(f"{means['low rank', size][0]:.3f}" for size in SIZES)
        beside = f"full {means['full tables', '1'][0]:.3f}, low rank {plain}; seeds: {seeds}"
        for (form, _), (loss, kept) in means.items():
            how = "fitted to trained tables" if "fitted" in form else "trained from the start"
            how += " and tuned" if "tuned" in form else ""
            setting = f"numbers in tables, {how} ({beside})"
            for kind, name in GALLERY.get(form.partition(", fitted")[0], ()):
                made.append(figure(kind, name, model, setting, kept, "held-out log-loss", loss))
    return made


if __name__ == "__main__":
    main()
