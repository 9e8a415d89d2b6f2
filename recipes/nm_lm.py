"""N:M sparsity of a language model: by decay, at once, and with a mask that never moves.

The embedded model's linear layers are brought to N of each M consecutive weights while it is
fine-tuned on its training text, for as many steps and on the same batches:

    fixed mask            the N largest at the start; the others are zero from the first step on
    SR-STE                N:M from the first step on, chosen again in every step; gradients go
                          straight through, and the others decay (arXiv 2102.04010)
    linear, exponential   the others fade out over the first part of the steps (arXiv 2402.04744)

Each way takes the best of a few learning rates by seed 0; the loss is that of held-out modules.

    python recipes/nm_lm.py                              # under five minutes of one core
    python recipes/nm_lm.py --patterns 1:8 2:4 --seeds 3 # a quarter of an hour

The abstract of the paper claims that recipes for N:M are made for about half of the weights, and
that decay improves quality by up to 2 % (vision) and 5 % (language) where over 80 % are pruned.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from python_text import Text, counted, held_out_loss, over_seeds, read, tune
from torch import nn

from lowrank.demo import tiny_lm
from lowrank.linalg.nm import nm_mask
from lowrank.train import NM
from lowrank.walk.sites import find_sites

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure, keep

LOSS = "held-out loss, nats per token"
WAYS = ("fixed mask", "SR-STE", "linear", "exponential")
Pattern = tuple[int, int]


def weights(model: nn.Module) -> list[nn.Parameter]:
    """Of the linear layers that `NM` takes: all but the head."""
    sites = find_sites(model)
    return [s.module.get_parameter("weight") for s in sites if s.kind == "linear" and not s.reason]


def pruned(model: nn.Module, pattern: Pattern) -> nn.Module:
    """The largest weights alone; no gradient reaches the others, so that they stay zero."""
    for weight in weights(model):
        mask = nm_mask(weight, *pattern)
        weight.data *= mask
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    return model


def tuned(
    dense: nn.Module, way: str, pattern: Pattern, text: Text, options: Any, lr: float, seed: int
) -> dict[str, Any]:
    """One way at one rate: its held-out loss, and the share of weights that are not zero."""
    model = copy.deepcopy(dense)
    decay = max(round(options.decay * options.steps), 1)

    def control(model: nn.Module, optimizer: Any) -> NM:
        named: Any = way.lower()
        return NM(model, optimizer, decay=decay, pattern=pattern, way=named)

    fixed = way == "fixed mask"
    if fixed:
        pruned(model, pattern)
    model = tune(model, text, lr, seed, options, None if fixed else control)
    every = weights(model)
    kept = sum(int(w.count_nonzero()) for w in every) / sum(w.numel() for w in every)
    loss = held_out_loss(model, text)
    n, m = pattern
    return {
        "way": way, "pattern": f"{n}:{m}", "seed": seed, "lr": lr, "loss": loss, "kept": kept,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--patterns", nargs="+", default=["1:8"], help="N:M")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--decay", type=float, default=0.6, help="share of the steps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-3, 1e-2, 2e-2])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tiny = tiny_lm()
    text = read(tiny, options.documents)
    before = held_out_loss(tiny.model, text)
    print(f"held-out loss of the dense model: {before:.3f}")
    print(f"{'':6}{'':14}{'rate':>10}{'kept':>10}{'loss':>10}{'of each seed':>24}", flush=True)
    runs, gallery = [], []
    for named in options.patterns:
        n, m = (int(number) for number in named.split(":"))
        for way in WAYS:
            run = partial(tuned, tiny.model, way, (n, m), text, options)
            found = over_seeds(options.rates, options.seeds, run)
            lr, mean, each = counted(found)
            print(
                f"{named:6}{way:14}{lr:>10g}{found[0]['kept']:10.4f}{mean:10.3f}{each:>24}",
                flush=True,
            )
            runs += found
            if way != "fixed mask":
                setting = f"weights of linear layers, {way}"
                gallery.append(
                    figure("controllers", "NM", "embedded model", setting, n / m, LOSS, mean)
                )
    if options.write:
        keep("nm_lm", runs, options.seeds - 1, settings=vars(options), dense=before,
             gallery=gallery)  # fmt: skip


if __name__ == "__main__":
    main()
