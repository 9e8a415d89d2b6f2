"""GBLR: does training find better structured matrices than low rank and BLAST (arXiv 2310.18882)?

The paper's claim: ViT-B, ResNet-18 and GPT-2 with learned sums of rank-one blocks are better than
with low rank, block-sparse or block low-rank weights of as many products. Here two beds, every form
with as many products, the same steps, batches and learning rates:

- a classifier of scikit-learn's digits, its two wide layers trained from scratch: accuracy on test
  images, mean of the seeds;
- the embedded language model, compressed to each form and tuned on the source of Python's standard
  library: loss on text that it was not trained on, before and after. The same steps of the dense
  model stand beside them.

    python recipes/gblr.py                    # less than five minutes on two cores
    python recipes/gblr.py --only digits

All forms begin as close to the weights (of the digits: fresh ones) as they can, without data.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from images import Images, accuracy, digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from train_tiny_lm import sources

import lowrank
from lowrank.demo import held_out_rows, tiny_lm
from lowrank.linalg import blast_factors
from lowrank.nn import BlastLinear, BlockLowRankLinear, is_factored
from lowrank.train import GBLR

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep

LOSS = "loss after tuning, nats per token"
INNER = ("1", "3")  # of the net of the digits
WAYS = ("dense", "low rank", "blast", "gblr, fixed", "gblr")


def as_blast(model: nn.Module, names: Sequence[str], ratio: float) -> nn.Module:
    """These layers as 8 × 8 blocks that share their bases, fitted to the weights."""
    for name in names:
        layer: Any = model.get_submodule(name)
        blocks, (out, inner) = 8, layer.weight.shape
        rank = int(ratio * out * inner / (out + inner + blocks**2))
        factors = blast_factors(layer.weight, blocks, rank, sweeps=60)
        shape = out, inner
        new = BlastLinear.from_factors(*(f.float() for f in factors), layer.bias, shape=shape)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model


def built(
    way: str, dense: nn.Module, names: Sequence[str], ratio: float, steps: int, rate: float,
    options: argparse.Namespace,
) -> tuple[nn.Module, Any, GBLR | None]:  # fmt: skip
    """A copy of the model in its form, its optimizer, and a controller.

    "gblr, fixed" has the blocks of the closed-form start: nothing is learned about them.
    """
    model, controller = copy.deepcopy(dense), None
    if way == "low rank":
        model, _ = lowrank.compress(
            model, ratio, method="svd", data=None, align=1, progress=False,
            target_modules=list(names),
        )  # fmt: skip
    if way == "blast":
        model = as_blast(model, names, ratio)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    if way.startswith("gblr"):
        moving: dict[str, Any] = {"steps": 1, "rate": 0.0}
        if way == "gblr":
            moving = {
                "steps": max(steps * 3 // 4, 1), "rate": options.structure,
                "start": options.start * ratio,
            }  # fmt: skip
        controller = GBLR(model, optimizer, ratio=ratio, target_modules=list(names), **moving)
    return model, optimizer, controller


def trained(
    way: str, dense: nn.Module, names: Sequence[str], ratio: float, steps: int, rate: float,
    loss: Any, options: argparse.Namespace,
) -> nn.Module:  # fmt: skip
    """After these steps, at a rate that rises for a tenth of them and falls on a cosine."""
    model, optimizer, controller = built(way, dense, names, ratio, steps, rate, options)
    model.train()
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=max(0.1, 2 / steps), cycle_momentum=False
    )
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        if controller:
            controller.before_step()
        optimizer.step()
        if controller:
            controller.after_step()
        schedule.step()
    return (controller.finish() if controller else model).eval()


def kept(model: nn.Module, dense: nn.Module, names: Sequence[str]) -> float:
    """Products of these layers, of those of the dense ones."""

    def products(net: nn.Module) -> int:
        layers: list[Any] = [net.get_submodule(name) for name in names]
        return sum(m.cost().macs if is_factored(m) else m.weight.numel() for m in layers)

    return products(model) / products(dense)


def blocks(model: nn.Module) -> str:
    """How many terms there are, and how wide they are on average."""
    found = [m for m in model.modules() if isinstance(m, BlockLowRankLinear)]
    terms = sum(m.rank for m in found)
    wide = sum(float(m.down.place[:, 1].sum()) / m.in_features for m in found)
    high = sum(float(m.up.place[:, 1].sum()) / m.out_features for m in found)
    return f"{terms} blocks, {high / terms:.2f} high, {wide / terms:.2f} wide" if terms else ""


def on_digits(options: argparse.Namespace) -> list[dict[str, Any]]:
    images: Images = digits(8)
    fifth = len(images.x) // 5
    held, x, y = (images.x[:fifth], images.y[:fifth]), images.x[fifth:], images.y[fifth:]

    def loss(model: nn.Module, step: int) -> Tensor:
        rows = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(step))
        return cross_entropy(model(x[rows]), y[rows])

    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
            nn.Linear(128, 10),
        )  # fmt: skip

    print(f"{images.name}: {len(x)} to train, {fifth} held out, {len(images.test_x)} to test")
    print(f"{'':12}{'asked':>8}{'products':>10}{'rate':>8}{'held out':>10}{'test %':>8}  blocks")
    rows: list[dict[str, Any]] = []
    for ratio in options.digit_ratios:
        for way in WAYS:
            if way == "dense" and ratio != options.digit_ratios[0]:
                continue
            best: tuple[float, float, list[nn.Module]] = (-1, 0, [])
            for rate in options.digit_rates:
                models = [
                    trained(way, net(seed), INNER, ratio, options.digit_steps, rate, loss, options)
                    for seed in range(options.seeds)
                ]
                right = statistics.fmean(accuracy(m, *held) for m in models)
                best = max(best, (right, rate, models), key=lambda item: item[0])
            right, rate, models = best
            test = 100 * statistics.fmean(accuracy(m, images.test_x, images.test_y) for m in models)
            share = statistics.fmean(kept(m, net(0), INNER) for m in models)
            print(
                f"{way:12}{ratio:8.2f}{share:10.3f}{rate:8g}{100 * right:10.2f}{test:8.2f}  "
                f"{blocks(models[0])}",
                flush=True,
            )
            rows.append({"bed": images.name, "way": way, "asked": ratio, "products": share,
                         "rate": rate, "test": test})  # fmt: skip
    return rows


def on_language(options: argparse.Namespace) -> list[dict[str, Any]]:
    tiny = tiny_lm()
    texts = sources()[0]
    texts = texts[:: max(len(texts) // options.documents, 1)]
    tokens = [tiny.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    stream = torch.tensor([token for text in tokens for token in text])
    rows = held_out_rows(tiny)[:: options.every]
    names = [n for n, m in tiny.model.named_modules() if type(m) is nn.Linear and n != "lm_head"]

    def loss(model: Any, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(stream) - options.length, (options.batch,), generator=generator)
        batch = torch.stack([stream[s : s + options.length + 1] for s in starts])
        return cross_entropy(model(input_ids=batch[:, :-1]).logits.flatten(0, 1),
                             batch[:, 1:].flatten())  # fmt: skip

    @torch.no_grad()
    def judged(model: Any) -> float:
        losses = [
            cross_entropy(model(input_ids=r[None, :-1]).logits[0], r[1:]).item() for r in rows
        ]
        return statistics.fmean(losses)

    print(f"\nthe embedded model: {options.steps} steps of {options.batch} rows, "
          f"{options.length} tokens each")  # fmt: skip
    print(f"{'':12}{'asked':>8}{'products':>10}{'before':>9}{'after':>9}{'seconds':>9}  blocks")
    found: list[dict[str, Any]] = []
    for ratio in options.ratios:
        for way in WAYS:
            if way == "dense" and ratio != options.ratios[0]:
                continue
            begun = time.perf_counter()
            before = judged(
                built(way, tiny.model, names, ratio, 1, options.rate, options)[0].eval()
            )
            model = trained(
                way, tiny.model, names, ratio, options.steps, options.rate, loss, options
            )
            share, after = kept(model, tiny.model, names), judged(model)
            took = time.perf_counter() - begun
            print(
                f"{way:12}{ratio:8.2f}{share:10.3f}{before:9.3f}{after:9.3f}{took:9.0f}  "
                f"{blocks(model)}",
                flush=True,
            )
            found.append({"bed": "embedded model", "way": way, "asked": ratio, "products": share,
                          "before": before, "after": after, "seconds": took})  # fmt: skip
    return found


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of GBLR, with those of low rank and BLAST at as many products beside them."""
    made = []
    for row in rows:
        if row["way"] == "gblr":
            key, measure = ("test", "top-1, %") if "test" in row else ("after", LOSS)
            bed = row["bed"], row["asked"]
            beside = {one["way"]: f"{one[key]:.3g}" for one in rows
                      if (one["bed"], one["asked"]) == bed}  # fmt: skip
            setting = f"products (low rank {beside['low rank']}, BLAST {beside['blast']})"
            made += [
                figure(kind, name, row["bed"], setting, row["products"], measure, row[key],
                       row.get("seconds"))
                for kind, name in (("controllers", "GBLR"), ("forms", "BlockLowRankLinear"))
            ]  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["digits", "language"])
    parser.add_argument("--digit-ratios", type=float, nargs="+", default=[0.16, 0.08])
    parser.add_argument("--digit-rates", type=float, nargs="+", default=[1e-2])
    parser.add_argument("--digit-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5])
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=96, help="tokens of a row")
    parser.add_argument("--every", type=int, default=8, help="of the held-out rows")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--structure", type=float, default=1e-3, help="rate of widths and starts")
    parser.add_argument("--start", type=float, default=1.0, help="of the budget, at the start")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    if options.only != "language":
        rows += on_digits(options)
    if options.only != "digits":
        rows += on_language(options)
    if options.write:
        keep("gblr", rows, options.seeds - 1, settings=vars(options), gallery=shown(rows))


if __name__ == "__main__":
    main()
