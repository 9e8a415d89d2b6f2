"""Tucker-2 of the convolutions of a trained ResNet-20: by the weight, and by the outputs.

    LOWRANK_ASSETS=… python benchmarks/tucker.py [--images 200] [--pairs 5]

By the weight, half of the channels on both sides: shares of ‖W‖² that are lost by the truncated
HOSVD, by our alternation and by tensorly's `partial_tucker` (if it is installed), and the time of
theirs over ours, medians of runs in turns. By the outputs: the share of E‖y‖² that is lost at equal
parameters by whitened channels and by whitened Tucker forms, on the images that the Gram matrices
are of and on as many others. One thread. The folder holds cifar10/resnet20.safetensors and
cifar10/cifar10_subset.npz.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import keep
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank
from lowrank import layouts, linalg
from lowrank.linalg import tucker as numerics
from lowrank.methods import Whitened, WhitenedTucker
from lowrank.timing import paired_ratio

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
from compress_resnet_cifar import ResNet20, normalised

KEEPS = (0.7, 0.5, 0.3)
LEAST_S = 0.01


def net_and_images(folder: Path, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The trained net, `count` train images, and `count` others."""
    net = ResNet20().eval()
    net.load_state_dict(load_file(folder / "resnet20.safetensors"))
    with np.load(folder / "cifar10_subset.npz") as stored:
        images = normalised(stored["x_train"][: 2 * count])
    return net, images[:count], images[count:]


def kernels(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights (O, I, K) of all convolutions but the first."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 3:
            yield name, module.weight.detach().flatten(2)


def loss(weight: Tensor, near: Tensor) -> float:
    return float((weight.double() - near).square().sum() / weight.double().square().sum())


def by_tensorly(weight: Any, ranks: tuple[int, int]) -> Any:
    from tensorly.decomposition import partial_tucker

    found: Any = partial_tucker(weight, rank=list(ranks), modes=[0, 1])
    return found


def theirs(weight: Tensor, ranks: tuple[int, int], pairs: int) -> tuple[float, float] | None:
    """Share that tensorly loses, and its time over ours; both start from float64."""
    try:
        import tensorly
    except ImportError:
        return None
    tensorly.set_backend("numpy")
    array = weight.double().numpy()
    (core, (out, into)), _ = by_tensorly(array, ranks)
    near = np.einsum("pjk,op,ij->oik", core, out, into)
    ours = partial(numerics.tucker, weight, ranks)
    ratio = paired_ratio(partial(by_tensorly, array, ranks), ours, pairs=pairs, least_s=LEAST_S)
    return loss(weight, torch.from_numpy(near)), ratio


def by_weight(net: nn.Module, pairs: int) -> list[dict[str, Any]]:
    rows, seen = [], set()
    print(f"{'convolution':16} {'shape':>12} {'ranks':>8} {'HOSVD':>9} {'HOOI':>9} "
          f"{'tensorly':>9} {'time':>6}")  # fmt: skip
    for name, weight in kernels(net):
        if weight.shape in seen:  # one of each shape: the timing is what takes long
            continue
        seen.add(weight.shape)
        ranks = (weight.shape[0] // 2, weight.shape[1] // 2)
        total = float(weight.double().square().sum())
        start = float(numerics.hosvd_errors(weight)[ranks]) / total
        ours = loss(weight, numerics.rebuilt(numerics.tucker(weight, ranks)))
        other = theirs(weight, ranks, pairs)
        shown = f"{other[0]:9.5f} {other[1]:6.2f}" if other else "not installed"
        print(
            f"{name:16} {tuple(weight.shape)!s:>12} {ranks!s:>8} {start:9.5f} {ours:9.5f} {shown}"
        )
        rows.append({"name": name, "shape": list(weight.shape), "ranks": ranks, "hosvd": start,
                     "hooi": ours, "tensorly": other and other[0],
                     "tensorly_over_ours": other and other[1]})  # fmt: skip
    return rows


def by_outputs(net: nn.Module, images: Tensor, others: Tensor) -> list[dict[str, Any]]:
    seen, fresh = (
        lowrank.calibrate(net, list(part.split(50)), progress=False).statistics
        for part in (images, others)
    )
    ways = {"channels": Whitened(), "tucker": WhitenedTucker()}
    rows = []
    for site in lowrank.sites.find(net):
        if site.kind != "conv" or site.module.in_channels == 3:  # type: ignore[comparison-overlap]
            continue
        stats, weight = seen[site.name], layouts.matrix(site.module).detach()
        curves = {name: way.curve(site, stats) for name, way in ways.items()}
        for share in KEEPS:
            row: dict[str, Any] = {"name": site.name, "keep": share}
            for name, way in ways.items():
                curve = curves[name]
                fit = [o for o in curve.options if o.cost.params <= share * site.cost.params]
                new: Any = way.factor(site.module, fit[-1], stats)
                row[name] = fit[-1].error / curve.total
                row[f"{name}, others"] = unseen(weight, new, fresh[site.name].gram)
                row[f"{name}, size"] = fit[-1].size
            rows.append(row)
    return rows


def unseen(weight: Tensor, new: Any, gram: Tensor | None) -> float:
    zero = linalg.squared_error(weight, 0 * weight, gram)
    return linalg.squared_error(weight, new.dense_weight(torch.float64), gram) / zero


def summary(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'keep':>5} {'channels':>9} {'Tucker':>9} {'ratio':>6} {'others: channels':>17} "
          f"{'Tucker':>9} {'ratio':>6} {'least':>6} {'most':>6}")  # fmt: skip
    for share in KEEPS:
        here = [row for row in rows if row["keep"] == share]
        line = f"{share:5.2f}"
        for end, wide in (("", 9), (", others", 17)):
            one, two = ([row[way + end] for row in here] for way in ("channels", "tucker"))
            ratios = [b / a for a, b in zip(one, two, strict=True)]
            middle = statistics.median(ratios)
            line += (
                f" {statistics.median(one):{wide}.5f} {statistics.median(two):9.5f} {middle:6.2f}"
            )
        print(f"{line} {min(ratios):6.2f} {max(ratios):6.2f}")
    print("medians over the convolutions; ratios Tucker / channels, the last two on other images")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    if "LOWRANK_ASSETS" not in os.environ:
        sys.exit("set LOWRANK_ASSETS to the folder that holds cifar10/resnet20.safetensors")
    torch.set_num_threads(1)
    folder = Path(os.environ["LOWRANK_ASSETS"]) / "cifar10"
    net, images, others = net_and_images(folder, arguments.images)
    weights = by_weight(net, arguments.pairs)
    outputs = by_outputs(net, images, others)
    summary(outputs)
    keep("tucker", outputs, images=arguments.images, by_weight=weights)


if __name__ == "__main__":
    main()
