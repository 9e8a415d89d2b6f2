"""MLPs in experts: KL against active neurons, beside pruning and other groups, and time.

    python benchmarks/factorllm.py [--model FOLDER --text FILE] [--experts 16] [--also 4 8 32]
    python benchmarks/factorllm.py --times [--experts 16]

At equal numbers of active neurons in every MLP: experts grouped by co-activation (`route_mlps`),
as the neurons stand, and at random, all with a router fitted the same way; and as many neurons for
every token, those of the largest weights (magnitude) or the largest contributions on the same rows.
The routed sum, whose factor is fitted, is also left as it is and scaled by experts / active as in
FactorLLM. `low rank` keeps half of the MLPs' parameters, stored ones too (`whitened`). `--times`
measures single MLPs with random weights and routers: one token, and many, routed against dense,
alternating, on one thread in processor time, which other programs disturb least; medians of ratios.
The paper (arXiv 2408.11855) is quoted beside.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from machine import keep
from torch import Tensor, nn

from lowrank import compress, route_mlps
from lowrank.calibration.batches import text_rows
from lowrank.calibration.mlp_inputs import rows_of_mlps
from lowrank.demo import tiny_lm
from lowrank.measure.eval import Reference
from lowrank.nn import RoutedMLP
from lowrank.walk.mlps import find_mlps

PAPER = (
    "FactorLLM, arXiv 2408.11855: up to 85 % of the original performance and more than 30 % "
    "faster (abstract); 1 of 4 experts: FLOPs of the MLPs -75 %, of the model -30 to -50 %, "
    "fine-tuned on 0.03 to 0.04 % of the data (TinyLlama, MobileLLaMA)"
)
SIZES = ((128, 256), (576, 1536), (2048, 5632))  # width and neurons
LENGTH = 256


def batches_of(text: str, tokenizer: Any, rows: int) -> list[Tensor]:
    cut = [row for row in text_rows(text, tokenizer, LENGTH) if len(row) == LENGTH][:rows]
    return list(torch.stack(cut).split(8))


def routed_of(model: nn.Module) -> dict[str, RoutedMLP]:
    return {name: m for name, m in model.named_modules() if isinstance(m, RoutedMLP)}


@torch.no_grad()
def pruned(model: nn.Module, data: list[Tensor], share: float, by: str) -> nn.Module:
    """A copy of which every MLP keeps this share of its neurons, the others being zero."""
    small = copy.deepcopy(model)
    mlps, _ = find_mlps(small, lambda: small(data[0]))
    inputs = rows_of_mlps(small, mlps, data, most=4096)
    for mlp in mlps:
        *inner, down = mlp.linears().values()
        score = down.weight.norm(dim=0)
        for layer in inner:
            score = score * layer.weight.norm(dim=1)
        if by == "contribution":
            plain = RoutedMLP.split(mlp.linears(), mlp.activation, torch.arange(mlp.neurons), 1)
            hidden = plain.hidden(inputs[mlp.name])
            score = hidden.square().mean(0) * down.weight.square().sum(0)
        down.weight[:, score.argsort()[: round((1 - share) * mlp.neurons)]] = 0
    return small


def quality(given: argparse.Namespace) -> list[dict[str, Any]]:
    if given.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        text = given.text.read_text(encoding="utf-8")
        middle = len(text) // 2
        calibration, held_out = text[:middle], text[middle:]
    else:
        model, tokenizer, held_out, calibration = tiny_lm()
    data = batches_of(calibration, tokenizer, given.rows)
    judged = batches_of(held_out, tokenizer, given.held)
    reference = Reference(model, judged)
    rows: list[dict[str, Any]] = []

    def add(way: str, other: nn.Module, active: int, **more: Any) -> None:
        found = {"kl": reference.kl(other), **more}
        row = {"way": way, "active neurons": active / given.experts, **found}
        rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()),
              flush=True)  # fmt: skip

    half = given.experts // 2
    for by in ("magnitude", "contribution"):
        add(f"pruned by {by}", pruned(model, data, half / given.experts, by), half)
    if not given.model:
        layers = ["gate_proj", "up_proj", "down_proj"]
        small, _ = compress(
            model, half / given.experts, method="whitened", data=data, target_modules=layers,
            copy=True, progress=False,
        )  # fmt: skip
        add("low rank", small, half)
    ours = None
    for groups in ("coactive", "contiguous", "random"):
        small, routing = route_mlps(
            model, given.experts, half, data=data, groups=groups, copy=True, progress=False
        )
        ours = ours or small
        add(groups, small, half, stored=routing.stored, products=routing.products,
            dense=routing.dense)  # fmt: skip
    assert ours is not None
    fitted = {name: mlp.scale.detach().clone() for name, mlp in routed_of(ours).items()}
    for way, factor in (("1", 1.0), ("experts / active", given.experts / half)):
        for mlp in routed_of(ours).values():
            mlp.scale.data.fill_(factor)
        add(f"coactive, its sum times {way}", ours, half)
    for name, mlp in routed_of(ours).items():
        mlp.scale.data.copy_(fitted[name])
    for active in dict.fromkeys((given.experts // 4, 3 * given.experts // 4, given.experts)):
        for mlp in routed_of(ours).values():
            mlp.active = active
        add("coactive, the same router", ours, active)
    for experts in given.also:
        small, _ = route_mlps(
            model, experts, experts // 2, data=data, copy=True, progress=False
        )  # fmt: skip
        add(f"coactive, {experts} experts", small, half)
    if given.steps:
        small, _ = route_mlps(
            model, given.experts, half, data=data, distill_steps=given.steps, copy=True,
            progress=False,
        )  # fmt: skip
        add(f"coactive, {given.steps} steps of distillation", small, half)
    return rows


def one_mlp(width: int, neurons: int, experts: int, active: int) -> RoutedMLP:
    layers = {
        "gate": nn.Linear(width, neurons, bias=False), "up": nn.Linear(width, neurons, bias=False),
        "down": nn.Linear(neurons, width, bias=False),
    }  # fmt: skip
    mlp = RoutedMLP.split(layers, "silu", torch.arange(neurons), experts, active)
    nn.init.normal_(mlp.router.weight)
    return mlp.requires_grad_(False)


def times(experts: int) -> list[dict[str, Any]]:
    """Time over that of the same MLP with all experts, which is computed as a dense one."""
    rows = []
    for width, neurons in SIZES:
        dense = one_mlp(width, neurons, experts, experts)
        for tokens in (1, 16, 512):
            x = torch.randn(tokens, width)
            calls = max(1, round(0.01 / seconds(dense, x, 3)))
            for active in (experts // 4, experts // 2):
                mlp = one_mlp(width, neurons, experts, active)
                ratio = median(seconds(mlp, x, calls) / seconds(dense, x, calls) for _ in range(9))
                row = {"width": width, "neurons": neurons, "tokens": tokens,
                       "active": active / experts, "time": ratio}  # fmt: skip
                rows.append(row)
                print(row, flush=True)
    return rows


@torch.no_grad()
def seconds(mlp: nn.Module, x: Tensor, calls: int) -> float:
    """Processor time of one call."""
    start = process_time()
    for _ in range(calls):
        mlp(x)
    return (process_time() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--also", type=int, nargs="*", default=())
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--held", type=int, default=24)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--times", action="store_true")
    given = parser.parse_args()
    print(PAPER)
    if given.times:
        torch.set_num_threads(1)
        keep("factorllm_times", times(given.experts), paper=PAPER)
        return
    name = f"factorllm_{given.model.name}" if given.model else "factorllm"
    sizes = {"experts": given.experts, "fitted_rows": given.rows, "held_out_rows": given.held}
    keep(name, quality(given), paper=PAPER, **sizes)


if __name__ == "__main__":
    main()
