"""Products by look-up (MADDNESS, arXiv 2106.10860) beside low rank at equal bytes of the tables.

    python benchmarks/lookups.py [--inputs 32 16 8] [--rows 96] [--threads 1]

The embedded model, all layers but the head, no training. Inputs are split into groups of so many; a
tree of four comparisons gives each group a code of 4 bits, and an output is the sum of one entry of
its table a group. Trees are grown on the layer's inputs in the dense model, tables are the ridge
regression of the dense outputs on the codes, and are taken to have 8 bits an entry: with groups of
g inputs 8 / g of the bytes that a weight of 16 bits has. "error": relative error of the outputs,
root mean square over the layers, on rows that nothing was fitted to. "time": of a layer 512 × 512
on 512 tokens in plain torch, relative to the dense one.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch
from machine import keep
from torch import Tensor, nn

import lowrank
from lowrank.demo import LENGTH, held_out_rows, judge, tiny_lm
from lowrank.measure.timing import paired_ratio

ROWS, TOKENS, LEVELS, RIDGE = 32, 8192, 4, 1.0


class Lookup(nn.Module):
    """y = Σ_c T_c[code_c(x)] + b. `dims`, `at`: (groups, levels), (groups, 2^levels - 1)."""

    def __init__(self, dims: Tensor, at: Tensor, tables: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dims, self.at, self.tables, self.bias = dims, at, tables, bias

    def codes(self, input: Tensor) -> Tensor:
        """(…, in) -> (…, groups)."""
        found = torch.zeros(*input.shape[:-1], len(self.dims), dtype=torch.long)
        groups = torch.arange(len(self.dims))
        for level in range(self.dims.shape[1]):
            bounds = self.at[groups, 2**level - 1 + found]
            found = 2 * found + (input[..., self.dims[:, level]] > bounds)
        return found

    def forward(self, input: Tensor) -> Tensor:
        entries = self.tables[torch.arange(len(self.dims)), self.codes(input)]
        output = entries.sum(-2)
        return output if self.bias is None else output + self.bias


def fitted(layer: nn.Linear, inputs: Tensor, group: int) -> Lookup:
    """The layer's look-ups, fitted to inputs (tokens, in)."""
    grown = [_tree(part, start) for start, part in _parts(inputs, group)]
    dims, at = (torch.stack(pair) for pair in zip(*grown, strict=True))
    empty = torch.zeros(len(dims), 2**LEVELS, layer.out_features)
    made = Lookup(dims, at, empty, layer.bias)
    hot = nn.functional.one_hot(made.codes(inputs), 2**LEVELS).flatten(1).double()
    square = hot.T @ hot + RIDGE * torch.eye(hot.shape[1], dtype=torch.float64)
    wanted = hot.T @ (inputs @ layer.weight.T).double()
    made.tables = torch.linalg.solve(square, wanted).float().view_as(empty)
    return made


def _parts(inputs: Tensor, group: int) -> list[tuple[int, Tensor]]:
    return [(i, inputs[:, i : i + group]) for i in range(0, inputs.shape[1], group)]


def _tree(part: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Dimension of each level and thresholds of its buckets, grown greedily: of all dimensions the
    one whose splits leave the least squared distance to the buckets' means."""
    buckets, dims, at = [part], [], []
    for _ in range(LEVELS):
        splits = [[_split(bucket, dim) for bucket in buckets] for dim in range(part.shape[1])]
        best = min(range(len(splits)), key=lambda dim: sum(left for left, _ in splits[dim]))
        bounds = [bound for _, bound in splits[best]]
        pairs = zip(buckets, bounds, strict=True)
        buckets = [b[m] for b, t in pairs for m in (b[:, best] <= t, b[:, best] > t)]
        dims.append(start + best)
        at += bounds
    return torch.tensor(dims), torch.tensor(at)


def _split(bucket: Tensor, dim: int) -> tuple[float, float]:
    """The least squared distance after one split along a dimension, and where it is."""
    if len(bucket) < 2:
        return 0.0, 0.0
    ordered = bucket[bucket[:, dim].argsort()].double()
    count = torch.arange(1, len(ordered), dtype=torch.float64)
    sums, total = ordered.cumsum(0)[:-1], ordered.sum(0)
    gained = sums.square().sum(1) / count
    gained += (total - sums).square().sum(1) / (len(ordered) - count)
    at = int(gained.argmax())
    left = float(ordered.square().sum() - gained[at])
    return left, float(ordered[at : at + 2, dim].mean())


def inputs_of(model: Any, rows: Tensor, layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """The inputs of each layer (tokens, in) on rows."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name, layer in layers.items()
    ]
    for batch in rows.split(16):
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def time_of(group: int) -> float:
    """Time of look-ups relative to the dense layer."""
    layer, tokens = nn.Linear(512, 512, bias=False), torch.randn(512, 512)
    made = fitted(layer, torch.randn(1024, 512), group)
    return paired_ratio(partial(made, tokens), partial(layer, tokens))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, nargs="+", default=[32, 16, 8])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tiny = tiny_lm()
    ids = torch.tensor(tiny.tokenizer(tiny.calibration, verbose=False)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    data, held_out = rows[: args.rows], held_out_rows(tiny)[-ROWS:]
    others = torch.stack([row[:LENGTH] for row in held_out])
    head = tiny.model.get_output_embeddings()
    layers = {
        name: layer for name, layer in tiny.model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }  # fmt: skip
    fitted_on, judged_on = (inputs_of(tiny.model, r, layers) for r in (data, others))
    found: list[dict[str, Any]] = []
    print(f"{'what':24} {'bytes':>6} {'error':>7} {'KL':>8} {'time':>6}")
    for group in args.inputs:
        share = 8 / group
        hashed, errors = copy.deepcopy(tiny.model), []
        for name, layer in layers.items():
            seen = fitted_on[name]
            some = seen[torch.randperm(len(seen))[:TOKENS]]
            made = fitted(layer, some, group)
            hashed.set_submodule(name, made)
            errors.append(_away(made, layer, judged_on[name]))
        add(
            found, f"groups of {group}", share, errors, hashed, tiny.model, held_out, time_of(group)
        )
        if share >= 1:
            continue
        low, _ = lowrank.compress(
            tiny.model, share, method="whitened", align=1, data=list(data.split(16)), copy=True,
            progress=False,
        )  # fmt: skip
        errors = [_away(low.get_submodule(n), layers[n], judged_on[n]) for n in layers]
        add(found, "whitened", share, errors, low, tiny.model, held_out, None)


def _away(made: nn.Module, layer: nn.Linear, inputs: Tensor) -> float:
    wanted = layer(inputs)
    return float((made(inputs) - wanted).square().sum() / wanted.square().sum())


def add(
    found: list[dict[str, Any]], what: str, share: float, errors: list[float], model: Any,
    dense: Any, held_out: list[Tensor], took: float | None,
) -> None:  # fmt: skip
    error = (sum(errors) / len(errors)) ** 0.5
    away = judge([dense, model], held_out)[1][1]
    found.append({"what": what, "bytes": share, "error": error, "kl": away, "time": took})
    said = "" if took is None else f"{took:6.2f}"
    print(f"{what:24} {share:6.2f} {error:7.3f} {away:8.4f} {said}", flush=True)
    keep("lookups", found, held_out_rows=len(held_out))


if __name__ == "__main__":
    main()
