"""How fast the forms sized by several numbers are, beside the dense layer and beside low rank.

    python benchmarks/sparse_speed.py

512 tokens, fp32, half of the numbers kept, one thread: medians of paired ratios, below 1 is faster.
Then the two ways that a dense-sparse layer has to apply its coefficients, gathered against
multiplied: the rule in lowrank/nn/dense_sparse.py rests on these.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from machine import keep
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank.nn.lowrank_sparse as form
from lowrank.linalg import nm_mask
from lowrank.measure.timing import paired_ratio
from lowrank.nn import (
    BlastLinear,
    DenseSparseLinear,
    LowRankLinear,
    LowRankMaskedLinear,
    LowRankSparseLinear,
    SparseDenseLinear,
)
from lowrank.nn.dense_sparse import GATHERED, LEAST

TOKENS, KEEP, DENSITY = 512, 0.5, 0.2
SHAPES = ((1024, 1024), (2048, 512), (512, 2048))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def code(out: int, inner: int, density: float, keep_: float = KEEP) -> DenseSparseLinear:
    most = out * inner // (out + inner)
    rank = min(int(keep_ * out * inner / (inner + density * out)), most)
    count = max(1, int((keep_ * out * inner - rank * inner) / out))
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(out, rank, generator=generator).topk(count, dim=1).indices.sort(1).values
    return DenseSparseLinear.from_code(normal(rank, inner), normal(out, count), index, None)


def by_columns(out: int, inner: int, density: float) -> SparseDenseLinear:
    layer = code(inner, out, density)
    basis = layer.basis.weight.detach().T
    return SparseDenseLinear.from_code(basis, layer.value.detach(), layer.index, None)


def low_rank(out: int, inner: int) -> LowRankLinear:
    rank = int(KEEP * out * inner / (out + inner))
    return LowRankLinear.from_factors(normal(rank, inner), normal(out, rank), None)


def channels(out: int, inner: int, share: float = 0.03) -> LowRankSparseLinear:
    count = max(1, round(share * inner))
    rank = int((KEEP * out * inner - count * out) / (out + inner))
    index = torch.randperm(inner, generator=torch.Generator().manual_seed(1))[:count].sort().values
    parts = normal(rank, inner), normal(out, rank), normal(out, count)
    return LowRankSparseLinear.from_parts(*parts, index, None)


def entries(out: int, inner: int) -> LowRankMaskedLinear:
    """2:4 beside the low rank."""
    whole = normal(out, inner)
    rank = max(1, round(0.02 * min(out, inner)))
    parts = normal(rank, inner), normal(out, rank), whole, nm_mask(whole, 2, 4)
    return LowRankMaskedLinear.from_parts(*parts, None)


def block(out: int, inner: int, blocks: int) -> BlastLinear:
    rank = int(KEEP * out * inner / (out + inner + blocks**2))
    layer = BlastLinear(inner, out, blocks, rank, bias=False)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return layer


def forms() -> list[dict[str, Any]]:
    found = []
    print(f"{'form':36} {'/ dense':>8} {'/ low rank':>10} {'MACs':>6} {'MACs / time':>11}")
    for out, inner in SHAPES:
        x, dense = normal(TOKENS, inner), nn.Linear(inner, out, bias=False)
        plain = low_rank(out, inner)
        layers: dict[str, nn.Module] = {
            "low rank": plain,
            f"dense-sparse, s / r {DENSITY}": code(out, inner, DENSITY),
            "dense-sparse, s / r 0.125": code(out, inner, 0.125),
            f"the same, by columns, {DENSITY}": by_columns(out, inner, DENSITY),
            "lowrank-sparse, 3 % of inputs": channels(out, inner),
            "blast, 8 blocks": block(out, inner, 8),
            "blast, 16 blocks": block(out, inner, 16),
            "lowrank-2:4": entries(out, inner),
        }
        for name, layer in layers.items():
            ratios = [
                paired_ratio(partial(layer, x), partial(other, x), pairs=15)
                for other in (dense, plain)
            ]
            macs = layer.cost().macs / (out * inner)  # type: ignore[operator]
            print(
                f"{name:28} {out}x{inner} {ratios[0]:8.3f} {ratios[1]:10.3f} {macs:6.3f} "
                f"{macs / ratios[0]:6.2f}",
                flush=True,
            )
            found.append({"form": name, "out": out, "in": inner, "tokens": TOKENS, "macs": macs,
                          "to_dense": ratios[0], "to_low_rank": ratios[1]})  # fmt: skip
    return found


def multiplied(layer: DenseSparseLinear, inner: Tensor) -> Tensor:
    return F.linear(inner, layer.coefficients())


def ways() -> list[dict[str, Any]]:
    """Time of gathering over that of multiplying with the zeros; the rule should pick below 1."""
    found = []
    print("\ndense-sparse 1024x1024, gathered / multiplied (tokens · s / r; * chosen: gathered)")
    for density in (0.125, DENSITY, 0.3, 0.5):
        layer = code(1024, 1024, density)
        for tokens in (1, 4, 16, 128, 512):
            inner = normal(tokens, layer.rank)
            ratio = paired_ratio(
                partial(layer._gathered, inner), partial(multiplied, layer, inner), pairs=15
            )
            load = tokens * layer.count / layer.rank
            mark = "*" if tokens >= LEAST and load <= GATHERED else ""
            print(f"s / r {density:5.3f} {tokens:5} tokens {load:7.1f} {ratio:7.3f} {mark}")
            found.append({"density": density, "tokens": tokens, "load": load, "ratio": ratio})
    return found


def joins() -> list[dict[str, Any]]:
    """Time of lowrank-sparse as one product over that of two; the rule should pick below 1."""
    found, rule = [], form.JOINED
    print("\nlowrank-sparse, one product / two (* chosen: one)")
    for out, inner in SHAPES:
        layer = channels(out, inner)
        for tokens in (16, 128, 512, 2048):
            x = normal(tokens, inner)
            ratio = paired_ratio(
                partial(joined, layer, x, 0), partial(joined, layer, x, 1 << 30), pairs=15
            )
            mark = "*" if tokens >= rule else ""
            print(f"{out}x{inner} {tokens:5} tokens {ratio:7.3f} {mark}", flush=True)
            found.append({"out": out, "in": inner, "tokens": tokens, "ratio": ratio})
    form.JOINED = rule
    return found


def joined(layer: LowRankSparseLinear, x: Tensor, least: int) -> Tensor:
    form.JOINED = least
    return layer(x)  # type: ignore[no-any-return]


def main() -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        rows, rule, one = forms(), ways(), joins()
    keep(
        "sparse_speed", rows, gathered_over_multiplied=rule, joined_over_apart=one,
        rule=f"tokens >= {LEAST}, tokens * s <= {GATHERED} * r",
    )  # fmt: skip


if __name__ == "__main__":
    main()
