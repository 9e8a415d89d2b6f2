"""Is a model better prepared for a cut before it is made? Training through the truncated weight.

    python benchmarks/prepare.py [--ratios 0.8 0.6] [--steps 720] [--only NAME …]
                                 [--model FOLDER --text FILE --rows 128] [--title prepare]

Each way takes the ranks that `fast` chose and as many steps of distillation in all, of 4 rows, on
the calibration rows and on 512 that the dense model wrote. "through the cut": the weights are
dense, every forward pass takes their best approximation of the layer's rank in the two-sided
metric, whose projector is made anew every 20 steps, and the gradient reaches the dense weight as if
there were none (straight through). "prepared" begins so with the dense model, as SpecTurn and
Prehab (arXiv 2512.01980) do, is cut, and trains factors for the rest of the steps. "refitted"
begins with the layers of `fast`. Judged on the calibration rows that were not drawn, one seed.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import keep
from quality import drawn, rows_of
from torch import Tensor, nn
from torch.nn.functional import linear

import lowrank
from lowrank import linalg
from lowrank.nn import LowRankLinear, PivotedLinear
from lowrank.recover.blocks import distill
from lowrank.recover.copies import factors_in, own_vectors
from lowrank.recover.training import Training
from lowrank.recover.written import further

BEST = lowrank.EFFORTS["best"]
ROWS, EVERY = BEST.recovery.rows, 20
RATE = 0.0016  # of training through the cut from the dense weights; that of factors is the usual
# Way: begins with the layers of `fast`; share of the steps that go through the cut.
WAYS = {
    "refitted, factors": (True, 0.0),
    "refitted, through the cut": (True, 1.0),
    "prepared, then factors": (False, 0.4),
    "prepared alone": (False, 1.0),
}


class Cut(nn.Module):
    """A linear layer of which every forward pass takes the best weight of a rank.

    Args:
        statistics: those of the layer; the norm is ‖S (W − Ŵ) R‖ with SᵀS = G, R Rᵀ = H.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rank: int, statistics: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.rank, self.steps = rank, 0
        self._left = linalg.output_root(statistics.out_gram)
        self._gram = statistics.gram.double()
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Make the projector of the weight as it is now."""
        rooted = self._left @ self.weight.double()
        basis = torch.linalg.eigh(rooted @ self._gram @ rooted.T).eigenvectors[:, -self.rank :]
        self.projector = torch.linalg.solve(self._left, basis @ (basis.T @ self._left)).float()

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.steps += 1
            if self.steps % EVERY == 0:
                self.project()
        cut = self.weight + (self.projector @ self.weight - self.weight).detach()
        return linear(input, cut, self.bias)

    def layer(self) -> LowRankLinear:
        self.project()
        return factored(self.projector.double() @ self.weight.double(), self.bias, self.rank)


def factored(weight: Tensor, bias: Tensor | None, rank: int) -> LowRankLinear:
    """Balanced plain factors of a weight (out, in) that has this rank."""
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = values[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    return LowRankLinear.from_factors(down.float(), up.float(), bias)


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in list(model.named_modules()):
        if isinstance(module, (PivotedLinear, LowRankLinear, Cut)):
            yield name, module


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, new)


def through(lean: nn.Module, start: nn.Module, seen: lowrank.Calibration) -> nn.Module:
    """A copy of `start`, the dense model or `lean`, with a `Cut` wherever `lean` has factors."""
    made = copy.deepcopy(start)
    for name, module in layers(lean):
        old = start.get_submodule(name)
        weight = old.weight if isinstance(old, nn.Linear) else old.dense_weight()
        put(made, name, Cut(weight, old.bias, module.rank, seen.statistics[name]))
    return made


def plain(lean: nn.Module) -> nn.Module:
    made = copy.deepcopy(lean)
    for name, module in layers(made):
        new = (
            module.layer()
            if isinstance(module, Cut)
            else factored(module.dense_weight(), module.bias, module.rank)
        )
        put(made, name, new)
    return made


def trained(
    dense: nn.Module, made: nn.Module, batches: list[Tensor], steps: int, rate: float | None
) -> nn.Module:
    vectors = own_vectors(made, {})
    weights = [module.weight for _, module in layers(made) if isinstance(module, Cut)]
    parameters = list(dict.fromkeys([*factors_in(made), *weights, *vectors]))
    distill(dense, made, batches, parameters, Training(steps, rate), len(batches) - 1)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--steps", type=int, default=720)
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--title", default="prepare")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dense, rows, _ = rows_of(args)
    order = drawn(rows, len(rows), 0)
    data, others = list(order[: args.rows].split(16)), list(order[args.rows :].split(16))
    seen = lowrank.with_fisher(dense, lowrank.calibrate(dense, data, progress=False))
    written = further(dense, data, BEST.recovery, 1, None)
    batches = [part for batch in (*data[:-1], *written) for part in batch.split(ROWS)]
    batches.append(data[-1])
    closed = replace(BEST.recovery, block_steps=0, distill_steps=0, temperature=False)
    found: list[dict[str, Any]] = []
    for ratio in args.ratios:
        lean, _ = lowrank.compress(
            dense, ratio, data=data, effort=replace(BEST, recovery=closed), align=1, copy=True,
            progress=False,
        )  # fmt: skip
        for name in args.only:
            refitted, share = WAYS[name]
            started, first = time.perf_counter(), round(share * args.steps)
            made = lean
            if first:
                made = through(lean, lean if refitted else dense, seen)
                before = float(lowrank.kl(made, dense, others))
                trained(dense, made, batches, first, None if refitted else RATE)
            else:
                before = float(lowrank.kl(made, dense, others))
            made = plain(made)
            if first < args.steps:
                trained(dense, made, batches, args.steps - first, None)
            row = {
                "way": name, "ratio": ratio, "before": before,
                "kl": float(lowrank.kl(made, dense, others)),
                "seconds": time.perf_counter() - started,
            }  # fmt: skip
            found.append(row)
            print(f"{name:28} {ratio} {before:.4f} -> {row['kl']:.4f}", flush=True)
            model = Path(args.model).name if args.model else "embedded"
            keep(
                args.title, found, steps=args.steps, judged_rows=len(order) - args.rows, model=model
            )


if __name__ == "__main__":
    main()
