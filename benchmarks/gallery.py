"""What each method loses by itself, for its page in the gallery: no effort, uniform ranks.

    python benchmarks/gallery.py [--only NAME …] [--ratios 0.8 0.6 0.4]
    python benchmarks/gallery.py --policies [NAME …]

Linear layers: the embedded model, mean KL to the dense one on its held-out text. Convolutions: the
ResNet-20 of LOWRANK_ASSETS, where that is set, top-1 on 761 images; all but the first are factored.
Equal stored parameters, plain factors where a method has a choice, fp32. Methods of which bytes are
the budget are in sparse_quality.py and rank_and_bits.py.

Every method has a file of its own, results/gallery/NAME.json, and any method of the registry that
is not named below is measured without more.

Policies have files beside them: with `whitened` on the embedded model, with `tucker` and `whitened`
on the ResNet-20. recipes/tucker_dlrt_cifar.py has evbmf as Kim et al. use it, without a budget.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, figure, keep

import lowrank
from lowrank.demo import held_out_rows, judge, tiny_lm
from lowrank.methods import JOINT, METHODS

BY_BYTES = {
    "dense-sparse", "lowrank-sparse", "lowrank-masked", "lowrank-2:4", "blast", "auto", "quantized",
}  # fmt: skip
ALL = {**METHODS, **JOINT}
SHARED = ("lossaware", "evbmf", "mixed-dimensions")  # policies that no other benchmark has
KEEPS = {"embedded model": (0.8, 0.6, 0.4), "ResNet-20": (0.7, 0.5, 0.3)}
KEPT_DENSE = "conv1|linear"  # of the ResNet-20: the first convolution and the head
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[n for n in ALL if n not in BY_BYTES])
    parser.add_argument("--ratios", type=float, nargs="+", help="others than the usual ones")
    parser.add_argument("--policies", nargs="*", help="these in place of methods; none: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (RESULTS / "gallery").mkdir(exist_ok=True)
    if args.policies is not None:
        of_policies(args.policies or SHARED, args.ratios)
        return
    kinds = {name: ALL[name]().kinds for name in args.only}
    texts = [name for name in args.only if "linear" in kinds[name]]
    images = [name for name in args.only if "conv" in kinds[name]]
    if images and "LOWRANK_ASSETS" in os.environ:
        for name, rows in of_images(images, args.ratios or KEEPS["ResNet-20"]):
            add(name, rows)
    if texts:
        for name, rows in of_text(texts, args.ratios or KEEPS["embedded model"]):
            add(name, rows)


def add(name: str, rows: list[Row]) -> None:
    """Write a method's rows, beside those of other models that its file has."""
    file = f"gallery/{name.replace(':', '-')}"
    path, model = RESULTS / f"{file}.json", rows[0]["model"]
    before = json.loads(path.read_text(encoding="utf-8"))["gallery"] if path.exists() else []
    keep(file, [], gallery=[*(row for row in before if row["model"] != model), *rows])


def of_text(names: list[str], ratios: Any) -> Iterator[tuple[str, list[Row]]]:
    tiny = tiny_lm()
    seen = lowrank.calibrate(tiny.model, tiny.calibration, tokenizer=tiny.tokenizer, progress=False)
    if any("gram" not in ALL[name]().needs or len(ALL[name]().needs) > 1 for name in names):
        seen = lowrank.with_fisher(tiny.model, seen)
    held_out = held_out_rows(tiny)
    for name in names:
        models, seconds = zip(
            *(made(tiny.model, ratio, name, seen) for ratio in ratios), strict=True
        )
        judged = [kl for _, kl in judge([tiny.model, *models], held_out)[1:]]
        yield (
            name,
            [
                shown(name, "embedded model", ratio, "KL, nats per token", kl, took)
                for ratio, kl, took in zip(ratios, judged, seconds, strict=True)
            ],
        )


def of_images(names: list[str], ratios: Any) -> Iterator[tuple[str, list[Row]]]:
    net, seen, right = resnet20()
    seen = lowrank.with_fisher(net, seen)
    for name in names:
        rows = []
        for ratio in ratios:
            lean, seconds = made(net, ratio, name, seen, exclude_modules=KEPT_DENSE)
            rows.append(shown(name, "ResNet-20", ratio, "top-1, %", right(lean), seconds))
        yield name, rows


def resnet20() -> tuple[Any, Any, Callable[[Any], float]]:
    """The net, its statistics, and what gives the top-1 of one like it."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    from compress_resnet_cifar import CALIBRATED, loaded, predictions, share

    net, train, test, labels = loaded(Path(os.environ["LOWRANK_ASSETS"]) / "cifar10")
    seen = lowrank.calibrate(net, list(train[:CALIBRATED].split(50)), progress=False)
    return net, seen, lambda lean: share(predictions(lean, test), labels)


def of_policies(names: Sequence[str], ratios: Any) -> None:
    tiny = tiny_lm()
    seen = lowrank.calibrate(tiny.model, tiny.calibration, tokenizer=tiny.tokenizer, progress=False)
    held_out = held_out_rows(tiny)
    for name in names:
        chosen = ratios or KEEPS["embedded model"]
        tried = [made(tiny.model, ratio, "whitened", seen, policy=name) for ratio in chosen]
        judged = judge([tiny.model, *(model for model, _ in tried)], held_out)[1:]
        add(name, [
            shown(name, "embedded model", ratio, "KL, nats per token", kl, took, "whitened")
            for ratio, (_, kl), (_, took) in zip(chosen, judged, tried, strict=True)
        ])  # fmt: skip
    if "LOWRANK_ASSETS" not in os.environ:
        return
    net, seen, right = resnet20()
    for name in names:
        if name == "mixed-dimensions":  # it gives ranks, and these forms have other sizes
            continue
        rows = []
        for method in ("tucker", "whitened"):
            for ratio in ratios or KEEPS["ResNet-20"]:
                options: dict[str, Any] = {"policy": name, "exclude_modules": KEPT_DENSE}
                lean, took = made(net, ratio, method, seen, **options)
                rows.append(shown(name, "ResNet-20", ratio, "top-1, %", right(lean), took, method))
        add(name, rows)


def made(
    model: Any, ratio: float, name: str, seen: Any, *, policy: str = "uniform", **options: Any
) -> tuple[Any, float]:
    """The compressed model, and the seconds that it took from statistics on."""
    started = time.perf_counter()
    lean, _ = lowrank.compress(
        model, ratio, method=name, policy=policy, data=seen, align=1, copy=True,
        progress=False, **options,
    )  # fmt: skip
    return lean, time.perf_counter() - started


def shown(
    name: str, model: str, ratio: float, measure: str, value: float, seconds: float,
    method: str | None = None,
) -> Row:  # fmt: skip
    """A row of the gallery; of a policy, if there is the method that it is measured with."""
    beside = f", with {method}" if method else ""
    print(f"{name + beside:30} {model:14} {ratio:4.1f} {value:8.3f} {measure}, {seconds:.1f} s",
          flush=True)  # fmt: skip
    kind = "policies" if method else "methods"
    setting = f"equal parameters{beside}"
    return figure(kind, name, model, setting, ratio, measure, value, seconds)


if __name__ == "__main__":
    main()
