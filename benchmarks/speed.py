"""How fast each stored form is beside the dense layer, and what 16 bits cost it.

    python benchmarks/speed.py

512 tokens, keep 0.5, two threads: medians of time / dense time over alternating pairs; below 1 is
faster. The share of products is what an ideal machine would show. Then the pivoted form with its
outputs and with its inputs gathered, three layers that share their input basis, what
prefer="speed" leaves factored, and the rounding of a random matrix to bfloat16.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from machine import keep
from torch import Tensor, nn

import lowrank
from lowrank.measure.timing import paired_ratio
from lowrank.nn import LowRankLinear, PivotedLinear, SharedLowRankLinear

TOKENS, KEEP = 512, 0.5
SHAPES = ((2048, 2048), (4096, 1024), (1024, 4096))
SIDES = (*SHAPES, (512, 192), (64, 172))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(out: int, inner: int, rank: int, dtype: torch.dtype) -> LowRankLinear:
    up, down = normal(out, rank, seed=1), normal(rank, inner, seed=2)
    return LowRankLinear.from_factors(down.to(dtype), up.to(dtype), None)


def pivoted_empty(out: int, inner: int, rank: int, side: str, dtype: torch.dtype) -> PivotedLinear:
    """Only its time counts: numbers and order are random."""
    spec = {"in_features": inner, "out_features": out, "rank": rank, "side": side, "bias": False}
    layer = PivotedLinear.empty(**spec).to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.order.copy_(torch.randperm(len(layer.order)))
    return layer


def rank_at(out: int, inner: int, form: str) -> int:
    """The largest rank that keeps half of the numbers."""

    def numbers(rank: int) -> int:
        return rank * (out + inner - (rank if form == "pivoted" else 0))

    return max(r for r in range(1, min(out, inner)) if numbers(r) <= KEEP * out * inner)


def timed(name: str, new: Any, dense: Any, x: Tensor, share: float) -> dict[str, Any]:
    ratio = paired_ratio(lambda: new(x), lambda: dense(x))
    print(f"{name:46} {share:7.3f} {ratio:7.3f} {share / ratio:7.2f}{'  SLOWER' * (ratio > 1)}")
    return {"form": name, "share_of_products": share, "time_ratio": ratio}


def forms() -> list[dict[str, Any]]:
    found = []
    print(f"{'form':46} {'macs':>7} {'time':>7} {'macs/time':>9}")
    for out, inner in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            x = normal(TOKENS, inner).to(dtype)
            dense = nn.Linear(inner, out, bias=False, dtype=dtype)
            for form in ("factors", "pivoted"):
                rank = rank_at(out, inner, form)
                side = "in" if out > inner else "out"
                layer: nn.Module = plain(out, inner, rank, dtype)
                if form == "pivoted":
                    layer = pivoted_empty(out, inner, rank, side, dtype)
                share = layer.cost().macs / (out * inner)  # type: ignore[operator]
                name = f"{form} {out}x{inner} {str(dtype).removeprefix('torch.')} rank {rank}"
                found.append(timed(name, layer, dense, x, share))
    return found


def sides() -> list[dict[str, Any]]:
    found = []
    print("\npivoted, half of full rank, float32: outputs or inputs gathered")
    for tokens in (TOKENS, 1):
        for out, inner in SIDES:
            rank, x = min(out, inner) // 2, normal(tokens, inner)
            dense = nn.Linear(inner, out, bias=False)
            for side in ("out", "in"):
                layer = pivoted_empty(out, inner, rank, side, torch.float32)
                name = f"{side} {out}x{inner}, {tokens} tokens"
                share = layer.cost().macs / (out * inner)
                found.append(timed(name, layer, dense, x, share))
    return found


def shared() -> list[dict[str, Any]]:
    print("\nq, k, v of 2048 -> 2048, 512, 512 with one input basis")
    inner, outs = 2048, (2048, 512, 512)
    x, rank = normal(TOKENS, inner), int(KEEP * inner * sum(outs) / (inner + sum(outs)))
    owner = plain(outs[0], inner, rank, torch.float32)
    ups = [normal(out, rank, seed=out) for out in outs[1:]]
    layers = [owner, *(SharedLowRankLinear.from_factors(owner, up, None) for up in ups)]
    dense = [nn.Linear(inner, out, bias=False) for out in outs]
    share = rank * (inner + sum(outs)) / (inner * sum(outs))

    def run(modules: list[Any], x: Tensor) -> list[Tensor]:
        fresh = x.clone()  # another tensor a call, as in a model: nothing is kept between calls
        return [module(fresh) for module in modules]

    return [timed(f"shared, rank {rank}", partial(run, layers), partial(run, dense), x, share)]


def preferred() -> list[dict[str, Any]]:
    """No layer that prefer="speed" factors may be slower than the dense one, timed anew."""
    print('\nprefer="speed", keep 0.5')
    found = []
    for storage in ("factors", "pivoted"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(192, 512), nn.Linear(512, 2048), nn.Linear(2048, 64)).eval()
        x = normal(TOKENS, 192)
        lean, report = lowrank.compress(
            model, KEEP, data=[x], storage=storage, prefer="speed", copy=True, progress=False
        )
        for index, (new, old) in enumerate(zip(lean, model, strict=True)):
            if type(new) is not type(old):
                given = normal(TOKENS, old.in_features)
                name = f"{storage}, layer {index} {old.out_features}x{old.in_features}"
                found.append(timed(name, new, old, given, report.achieved))
    return found


def rounding() -> dict[str, float]:
    up, down = normal(512, 256, seed=1).double(), normal(256, 512, seed=2).double()
    exact, low = up @ down, torch.bfloat16
    forms = {
        "factors": LowRankLinear.from_factors(down.to(low), up.to(low), None),
        "pivoted": PivotedLinear.from_factors(down, up, None, dtype=low),
    }
    found = {
        name: float((layer.dense_weight(torch.float64).detach() - exact).norm() / exact.norm())
        for name, layer in forms.items()
    }
    print(f"\n512x512 of rank 256 in bfloat16, relative error: {found}")
    return found


def main() -> None:
    torch.set_num_threads(2)
    with torch.no_grad():
        rows = forms() + sides() + shared() + preferred()
    keep("speed", rows, rounding=rounding())


if __name__ == "__main__":
    main()
