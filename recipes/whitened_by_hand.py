"""The activation-aware SVD in plain torch, next to `method="whitened"`: how to check the library.

`by_hand` is the whole algorithm and uses torch alone: hooks gather H = E[x xᵀ] for every linear
layer but the head, W H^½ is decomposed, every layer keeps the same share of its weights, and two
`nn.Linear` take its place. The optimum is that of SVD-LLM (arXiv 2403.07378); written as U_r U_rᵀ W
it needs no inverse of H^½. Then `lowrank.compress` does the same on a copy, and every layer and the
logits on text that neither has seen are compared.

The model is converted to float64: in float32 the factors are rounded and the library forms the
products of H in float32, which leaves 4e-6 on the embedded model. Transformers' Llama computes its
norms in float32 either way.

    python recipes/whitened_by_hand.py                                # the embedded model
    python recipes/whitened_by_hand.py --model FOLDER --text FILE     # another Llama
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def by_hand(model: Any, batches: Sequence[Tensor], ratio: float) -> dict[str, Tensor]:
    """Factor every nn.Linear but the head in place; returns H = E[x xᵀ] (in, in) of each."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings()
    }
    grams = {n: torch.zeros(2 * [w.in_features], dtype=torch.float64) for n, w in layers.items()}
    tokens = sum(batch.numel() for batch in batches)

    def watch(name: str, layer: nn.Linear) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].double().flatten(0, -2)  # (tokens, in)
            grams[name] += x.T @ x / tokens

        return layer.register_forward_pre_hook(add)

    hooks = [watch(name, layer) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    for hook in hooks:
        hook.remove()

    for name, layer in layers.items():
        weight = layer.weight.detach().double()  # W (out, in)
        out, width = weight.shape
        rank = int(Fraction(str(ratio)) * out * width / (out + width))  # r (out + in) fits
        values, vectors = torch.linalg.eigh(grams[name])
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # H^½ (in, in)
        leading = torch.linalg.svd(weight @ root).U[:, :rank]  # U_r (out, rank)
        # U_r U_rᵀ (W H^½) is the truncated SVD, so W_r = U_r U_rᵀ W: H^½ is never inverted
        down = nn.Linear(width, rank, bias=False, dtype=layer.weight.dtype)
        up = nn.Linear(rank, out, bias=layer.bias is not None, dtype=layer.weight.dtype)
        with torch.no_grad():
            down.weight.copy_(leading.T @ weight)
            up.weight.copy_(leading)
            if layer.bias is not None:
                up.bias.copy_(layer.bias)
        model.set_submodule(name, nn.Sequential(down, up))
    return grams


class Row(NamedTuple):
    """One layer: its rank, what the rank loses of the outputs, and how far the two results are."""

    layer: str
    rank: int
    lost: float
    difference: float


def compare(
    model: Any, batches: Sequence[Tensor], unseen: Tensor, ratio: float
) -> tuple[list[Row], float, float]:
    """By hand and by the library, on copies of one model.

    Args:
        model: in float64; left as it is.
        batches: calibration ids, each (rows, tokens) int64.
        unseen: ids (rows, tokens) that the logits are compared on.

    Returns:
        A row for every layer, ‖(W_hand − W_lowrank) H^½‖ / ‖W H^½‖; the relative difference of
        the two models' logits; and that of the model's own logits to them, as a scale for it.
    """
    import copy

    import lowrank

    hand = copy.deepcopy(model)
    grams = by_hand(hand, batches, ratio)
    ours, _ = lowrank.compress(
        model, ratio, method="whitened", policy="uniform", align=1, data=list(batches), copy=True,
        progress=False,
    )  # fmt: skip
    rows = []
    for name, gram in grams.items():
        weight = model.get_submodule(name).weight.detach()
        down, up = hand.get_submodule(name)
        product = (up.weight @ down.weight).detach()
        found = ours.get_submodule(name).dense_weight().detach()
        size = length(weight, gram)
        lost, apart = length(weight - product, gram), length(found - product, gram)
        rows.append(Row(name, len(down.weight), lost / size, apart / size))
    with torch.no_grad():
        by, of, dense = (each(input_ids=unseen).logits for each in (hand, ours, model))
    return rows, *(float((each - by).norm() / by.norm()) for each in (of, dense))


def length(matrix: Tensor, gram: Tensor) -> float:
    """‖M H^½‖_F = (E‖M x‖²)^½."""
    return float(((matrix @ gram) * matrix).sum().clamp(min=0).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="folder of a Llama; default: the embedded one")
    parser.add_argument("--text", type=Path, help="text to calibrate and compare on")
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--rows", type=int, default=64, help="calibration rows of 256 tokens")
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    if options.model is None:
        from lowrank.demo import tiny_lm

        model, tokenizer, text, _ = tiny_lm()
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(options.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        text = options.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    blocks = ids[: len(ids) // 256 * 256].view(-1, 256)
    if len(blocks) < options.rows + 4:
        parser.error(f"the text has {len(blocks)} rows of 256 tokens, --rows needs 4 more")
    batches, unseen = blocks[: options.rows].split(16), blocks[-4:]

    rows, logits, dense = compare(model.double(), batches, unseen, options.ratio)
    print(f"{'layer':34}{'rank':>6}{'lost':>9}{'difference':>13}")
    for row in rows:
        print(f"{row.layer:34}{row.rank:6}{row.lost:9.4f}{row.difference:13.1e}")
    largest = max(row.difference for row in rows)
    print(f"largest difference of a layer {largest:.1e}, of the logits {logits:.1e}", end=" ")
    print(f"(dense logits: {dense:.1e})")
    assert max(largest, logits) < 1e-6, "by hand and by lowrank differ"


if __name__ == "__main__":
    main()
