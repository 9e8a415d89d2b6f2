"""CUR, generalized Nyström and the tubal SVD beside the SVD and Tucker, at equal stored numbers.

    LOWRANK_ASSETS=… python benchmarks/factorizers.py [--only language resnet times] [--judged 32]
                                                      [--pairs 3] [--threads 1]

language: stories260K, every layer but the head, uniform shares, no rank alignment; lost share of
‖W‖², and KL on the first held-out rows of benchmarks/quality.py. resnet: ResNet-20, all
convolutions but the first, uniform shares, by their weights alone and by 1500 train images, without
any recovery; top-1 on 761 test images. Fourier: the tubal SVD with the Fourier transform in the
place of the cosines of `tubal`, truncated by one threshold for all frequencies of a layer; a
complex component counts two numbers for each of its entries, conjugate ones are stored once. times:
seconds for the curve of a random square weight and one layer of it, medians of runs in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS
from machine import keep as keep_result
from quality import rows_of
from torch import Tensor, nn

import lowrank
from lowrank import linalg
from lowrank.demo import judge
from lowrank.methods import CUR, SVD, Nystrom
from lowrank.nn import Form
from lowrank.types import Cost, Site, Statistics

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
from compress_resnet_cifar import CALIBRATED, loaded, predictions, share

METHODS = {
    "svd": "svd", "nystrom": "nystrom", "cur": "cur", "cur by leverage": CUR(choice="leverage"),
    "whitened": "whitened", "whitened-nystrom": "whitened-nystrom", "whitened-cur": "whitened-cur",
}  # fmt: skip
CONVOLUTIONS = (
    "svd", "nystrom", "tucker", "spatial", "Fourier", "tubal",
    "whitened-tucker", "whitened-spatial", "whitened-conv", "whitened-tubal",
)  # fmt: skip
PLAIN: dict[str, Any] = {"policy": "uniform", "align": 1, "copy": True, "progress": False}


def lost(dense: nn.Module, lean: nn.Module) -> float:
    """The share of ‖W‖² of all factored layers that they lost."""
    old, away, whole = dict(dense.named_modules()), 0.0, 0.0
    for name, module in lean.named_modules():
        if isinstance(module, Form):
            weight: Any = old[name].weight
            weight = weight.detach().flatten(1)
            away += linalg.squared_error(weight, module.dense_weight().flatten(1))
            whole += linalg.squared_error(weight, torch.zeros_like(weight))
    return away / whole


def language(folder: Path, judged: int) -> list[dict[str, Any]]:
    text = folder / "text" / "stories260K_selfgenerated.txt"
    dense, rows, held_out = rows_of(Namespace(model=folder / "stories260K", text=text))
    seen = lowrank.calibrate(dense, list(rows.split(16)), progress=False)
    found: list[dict[str, Any]] = []
    for ratio in (0.8, 0.6):
        for name, method in METHODS.items():
            data = seen if name.startswith("whitened") else None
            lean, report = lowrank.compress(dense, ratio, method=method, data=data, **PLAIN)
            (_, (_, kl)) = judge([dense, lean], held_out[:judged])
            found.append({
                "method": name, "ratio": ratio, "kept": report.achieved, "lost": lost(dense, lean),
                "kl": kl,
            })  # fmt: skip
            said = "{method:18} {ratio:4.1f} {kept:7.4f} {lost:7.4f} {kl:7.3f}"
            print(said.format(**found[-1]), flush=True)
    return found


def fourier(kernel: Tensor, limit: int) -> tuple[Tensor, int]:
    """The kernel (O, I, k, k) from at most `limit` numbers, and how many they are."""
    outputs, inputs, height, width = kernel.shape
    parts = torch.fft.fft2(kernel.double()).flatten(2).movedim(2, 0)  # (k², O, I)
    left, values, right = torch.linalg.svd(parts, full_matrices=False)
    twin = [-(f // width) % height * width + -(f % width) % width for f in range(height * width)]
    order = sorted(
        ((float(value), f, j) for f in range(len(twin)) if f <= twin[f]
         for j, value in enumerate(values[f])), reverse=True,
    )  # fmt: skip
    kept, used = torch.zeros_like(values), 0
    for _, f, j in order:
        cost = (outputs + inputs) * (1 if f == twin[f] else 2)
        if used + cost <= limit:
            kept[f, j], kept[twin[f], j], used = 1, 1, used + cost
    near = (left * (values * kept)[:, None, :]) @ right
    return torch.fft.ifft2(near.movedim(0, 2).unflatten(2, (height, width))).real, used


def resnet(folder: Path) -> list[dict[str, Any]]:
    net, train, test, labels = loaded(folder / "cifar10")
    seen = lowrank.calibrate(net, list(train[:CALIBRATED].split(50)), progress=False)
    found: list[dict[str, Any]] = []
    for ratio in (0.7, 0.5, 0.3):
        for name in CONVOLUTIONS:
            if name == "Fourier":
                lean, away, kept = fourier_net(net, ratio)
            else:
                lean, report = lowrank.compress(
                    net, ratio, method=name, data=seen if name.startswith("whitened") else None,
                    exclude_modules="conv1|linear", **PLAIN,
                )  # fmt: skip
                away, kept = lost(net, lean), report.achieved
            top1 = share(predictions(lean, test), labels)
            found.append({"method": name, "ratio": ratio, "kept": kept, "lost": away, "top1": top1})
            said = "{method:18} {ratio:4.1f} {kept:7.4f} {lost:7.4f} {top1:6.2f}"
            print(said.format(**found[-1]), flush=True)
    return found


def fourier_net(net: nn.Module, ratio: float) -> tuple[nn.Module, float, float]:
    """A copy, every convolution but the first from `fourier`, what it lost and what it keeps."""
    lean, away, whole, used, every = copy.deepcopy(net), 0.0, 0.0, 0, 0
    for module in lean.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 3:
            weight = module.weight.detach().clone()
            near, numbers = fourier(weight, int(ratio * weight.numel()))
            module.weight.data = near.to(weight)
            away += float((weight.double() - near).square().sum())
            whole += float(weight.double().square().sum())
            used, every = used + numbers, every + weight.numel()
    return lean, away / whole, used / every


def times(pairs: int) -> list[dict[str, Any]]:
    found = []
    for side in (512, 1024):
        layer = nn.Linear(side, side, bias=False)
        size = side * side
        site = Site("fc", ("fc",), "linear", (layer,), (side, side), Cost(size, 4 * size, size))
        taken: dict[str, list[float]] = {}
        for _ in range(pairs):
            for name, method in {"svd": SVD(), "nystrom": Nystrom(), "cur": CUR()}.items():
                started = time.perf_counter()
                options = method.curve(site, Statistics()).options
                option = [o for o in options if o.cost.params <= 0.6 * size][-1]
                method.factor(layer, option, Statistics())
                taken.setdefault(name, []).append(time.perf_counter() - started)
        found.append({"side": side, **{name: statistics.median(s) for name, s in taken.items()}})
        print(
            "{side:5}: svd {svd:.2f} s, nystrom {nystrom:.2f} s, cur {cur:.2f} s".format(
                **found[-1]
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("language", "resnet", "times")
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--judged", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    folder = Path(os.environ["LOWRANK_ASSETS"])
    torch.set_num_threads(args.threads)
    done = {
        "language": lambda: language(folder, args.judged), "resnet": lambda: resnet(folder),
        "times": lambda: times(args.pairs),
    }  # fmt: skip
    path = RESULTS / "factorizers.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    rows |= {part: done[part]() for part in args.only}
    keep_result("factorizers", rows, pairs=args.pairs)


if __name__ == "__main__":
    main()
