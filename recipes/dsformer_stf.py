"""A language model kept in 0.4 of its bytes: SVD, a fixed support, a random one, and STF.

The embedded model's linear layers are factored at equal stored bytes, indices included, and the
model is fine-tuned on its training text, on the same batches: low rank by SVD; a dense basis with
sparse coefficients (as in DSFormer, arXiv 2312.13211) whose support is fixed; the same basis with a
support drawn at random and coefficients fitted to it; and the first start with STF, which lets the
support follow the task. All start without data, as DSFormer does. Each way takes the best of a few
learning rates by seed 0. The loss is that of held-out modules.

    python recipes/dsformer_stf.py             # about five minutes of one core
    python recipes/dsformer_stf.py --seeds 3   # ten minutes
    python recipes/dsformer_stf.py --full      # long runs; an hour

A random support is the control: where it does as well as the decomposition's, the task says nothing
of supports. DSFormer's own results are for BERT-base on GLUE and SQuAD, not for this.
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
from torch import Tensor, nn

import lowrank
from lowrank.demo import tiny_lm
from lowrank.nn import DenseSparseLinear
from lowrank.train import STF

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import figure
from machine import keep as kept

LOSS = "held-out loss, nats per token"
WAYS = ("SVD", "random support", "fixed support", "STF")


def controlled(keep: float, options: Any, model: nn.Module, optimizer: Any) -> STF:
    freeze = max(round(options.freeze * options.steps), 1)
    return STF(
        model, optimizer, ratio=keep, density=options.density, every=options.every, freeze=freeze
    )


def decomposed(dense: nn.Module, keep: float, options: Any) -> nn.Module:
    """What STF starts from, as it would be stored."""
    model = copy.deepcopy(dense)
    return controlled(keep, options, model, torch.optim.SGD(model.parameters(), lr=0.1)).finish()


@torch.no_grad()
def redraw(layer: DenseSparseLinear, weight: Tensor, generator: torch.Generator) -> None:
    """Other atoms for every row, with the coefficients that fit the weight best."""
    draws = torch.rand(weight.shape[0], layer.rank, generator=generator)
    index = draws.argsort(dim=1)[:, : layer.count].sort(dim=1).values
    atoms = layer.basis.weight.double()
    gram, seen = atoms @ atoms.T, weight.double() @ atoms.T
    value = torch.linalg.solve(gram[index[:, :, None], index[:, None, :]], seen.gather(1, index))
    layer.index.copy_(index)
    layer.value.copy_(value)


def start(
    dense: nn.Module, code: nn.Module, way: str, keep: float, seed: int, options: Any
) -> nn.Module:
    """What is fine-tuned."""
    if way == "SVD":
        done = lowrank.compress(
            dense, keep, method="svd", policy="uniform", unit="bytes", align=1, data=None,
            copy=True, progress=False,
        )  # fmt: skip
        return done[0]
    model = copy.deepcopy(dense if way == "STF" else code)
    if way == "random support":
        generator = torch.Generator().manual_seed(seed)
        for name, layer in model.named_modules():
            if isinstance(layer, DenseSparseLinear):
                redraw(layer, dense.get_submodule(name).get_parameter("weight"), generator)
    return model


def linear_bytes(model: nn.Module, dense: nn.Module) -> int:
    """Stored by the layers that are linear in the dense model, the head left out."""
    head = dense.get_output_embeddings()  # type: ignore[operator]
    named = [n for n, m in dense.named_modules() if isinstance(m, nn.Linear) and m is not head]
    stored = [t for name in named for t in model.get_submodule(name).state_dict().values()]
    return sum(t.numel() * t.element_size() for t in stored)


def tuned(
    dense: nn.Module, code: nn.Module, way: str, keep: float, text: Text, options: Any,
    lr: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """One fine-tuning: held-out loss before and after, and stored bytes."""
    model = start(dense, code, way, keep, seed, options)
    before = held_out_loss(code if way == "STF" else model, text)
    control = partial(controlled, keep, options) if way == "STF" else None
    model = tune(model, text, lr, seed, options, control)
    return {
        "way": way, "keep": keep, "seed": seed, "lr": lr, "before": before,
        "loss": held_out_loss(model, text), "bytes": linear_bytes(model, dense),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="long runs; an hour")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.4], help="bytes of linears")
    parser.add_argument("--density", type=float, default=0.3, help="s / r")
    parser.add_argument("--every", type=int, default=1, help="steps between choices of the support")
    parser.add_argument("--freeze", type=float, default=0.7, help="share of the steps until then")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 2e-2])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.full:
        options.keeps, options.steps, options.documents = [0.6, 0.4, 0.2], 500, 250
    tiny = tiny_lm()
    text = read(tiny, options.documents)
    print(f"held-out loss of the dense model: {held_out_loss(tiny.model, text):.3f}")
    heads = f"{'rate':>10}{'bytes':>12}{'share':>8}{'before':>10}{'loss':>10}{'of each seed':>24}"
    print(" " * 22 + heads, flush=True)
    whole, runs, gallery = linear_bytes(tiny.model, tiny.model), [], []
    for keep in options.keeps:
        code = decomposed(tiny.model, keep, options)
        for way in WAYS:
            run = partial(tuned, tiny.model, code, way, keep, text, options)
            found = over_seeds(options.rates, options.seeds, run)
            lr, mean, each = counted(found)
            size, before = found[0]["bytes"], found[0]["before"]
            print(
                f"{keep:<6g}{way:16}{lr:>10g}{size:12,}{size / whole:8.3f}{before:10.3f}"
                f"{mean:10.3f}{each:>24}",
                flush=True,
            )
            runs += found
            if way == "STF":
                setting = "bytes of linear layers"
                gallery.append(
                    figure("controllers", "STF", "embedded model", setting, keep, LOSS, mean)
                )
    if options.write:
        kept("dsformer_stf", runs, options.seeds - 1, settings=vars(options), gallery=gallery)


if __name__ == "__main__":
    main()
