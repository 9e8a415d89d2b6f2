"""Tucker-2 of the convolutions of a trained ResNet-20: by the weight, and by the outputs.

    LOWRANK_ASSETS=… python benchmarks/tucker.py [--images 200] [--pairs 5]

By the weight, half of the channels on both sides: shares of ‖W‖² that are lost by the truncated
HOSVD, by our alternation and by tensorly's `partial_tucker` (if it is installed), and the time of
theirs over ours, medians of runs in turns. By the outputs: the share of E‖y‖² that is lost at equal
parameters by whitened channels, by whitened Tucker forms, by these after alternation, and by rows
and columns apart, on the images that the Gram matrices are of and on as many others. One thread.
The folder holds cifar10/resnet20.safetensors and cifar10/cifar10_subset.npz.
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
from lowrank import linalg
from lowrank.linalg import tucker as numerics
from lowrank.measure.timing import paired_ratio
from lowrank.methods import Whitened, WhitenedTucker
from lowrank.types import Site, Statistics

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
        ours = loss(weight, numerics.rebuilt(numerics.tucker_factors(weight, ranks)))
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
    rows = []
    for site in lowrank.walk.sites.find_sites(net):
        conv: Any = site.module
        if site.kind != "conv" or conv.in_channels == 3:
            continue
        stats, other = seen[site.name], fresh[site.name].gram
        weight, zero = conv.weight.detach().flatten(1), torch.zeros_like(conv.weight.flatten(1))
        for share in KEEPS:
            row: dict[str, Any] = {"name": site.name, "keep": share}
            for form, (size, near) in nearest(site, stats, share).items():
                lost, fresh_lost = (
                    linalg.squared_error(weight, near, gram)
                    / linalg.squared_error(weight, zero, gram)
                    for gram in (stats.gram, other)
                )
                row[form] = {"size": size, "lost": lost, "others": fresh_lost}
            rows.append(row)
    return rows


def nearest(site: Site, stats: Statistics, share: float) -> dict[str, tuple[Any, Tensor]]:
    """For each form its size and its dense weight (O, I · K), of at most `share` of the numbers."""
    conv: Any = site.module
    gram, weight = stats.gram, conv.weight.detach()
    assert gram is not None
    found: dict[str, tuple[Any, Tensor]] = {}
    for name, way in (("channels", Whitened()), ("Tucker", WhitenedTucker())):
        options = way.curve(site, stats).options
        best = [o for o in options if o.cost.params <= share * site.cost.params][-1]
        new: Any = way.factor(conv, best, stats)
        found[name] = best.size, new.dense_weight(torch.float64)
        if best.storage == "tucker":
            children = (new.last, new.core, new.first)
            last, core, first = (child.weight.detach().double().flatten(2) for child in children)
            parts = (last[..., 0], core, first[..., 0])
            better, _ = numerics.alternated(weight.flatten(2), parts, gram)
            found["alternated"] = best.size, numerics.rebuilt(better).flatten(1)
        elif name == "Tucker":
            found["alternated"] = found[name]
    outputs, inputs, height, width = weight.shape
    rank = int(share * weight.numel()) // (outputs * width + inputs * height)
    up, down = linalg.spatial_factors(weight, rank, gram)
    found["spatial"] = (rank,), torch.einsum("orb,ria->oiab", up, down).flatten(1)
    return found


def summary(rows: list[dict[str, Any]]) -> None:
    forms = [form for form in rows[0] if form not in ("name", "keep")]
    print(f"\n{'keep':>5} {'form':10} {'lost':>8} {'/ channels':>10} {'others':>8} "
          f"{'/ channels':>10} {'least':>6} {'most':>6}")  # fmt: skip
    for share in KEEPS:
        here = [row for row in rows if row["keep"] == share]
        for form in forms:
            line = f"{share:5.2f} {form:10}"
            for images in ("lost", "others"):
                ours = [row[form][images] for row in here]
                ratios = [row[form][images] / row["channels"][images] for row in here]
                line += f" {statistics.median(ours):8.5f} {statistics.median(ratios):10.2f}"
            print(f"{line} {min(ratios):6.2f} {max(ratios):6.2f}")
    print("medians over the convolutions; least and most of the ratios on other images")


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
