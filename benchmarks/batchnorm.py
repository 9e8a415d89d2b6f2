"""Batch norms after compression: left, estimated anew, or moved by what differs from the dense net.

    LOWRANK_ASSETS=… python benchmarks/batchnorm.py [--keep 0.7 0.5 0.3]

ResNet-20 of recipes/compress_resnet_cifar.py, its calibration and budget; top-1 on 761 test images
and KL to the dense net on 500 held-out train images, before and after each. `lowrank.recover`
moves them, and keeps that only where the KL falls.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from machine import keep as keep_result

import lowrank
from lowrank import Recovery
from lowrank.recover.batchnorm import batch_norms, gathered, moved, set_moments

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from compress_resnet_cifar import CALIBRATED, HELD, loaded, predictions, share

WAYS: dict[str, dict[str, Any]] = {
    "whitened, spectrum": {"method": "whitened", "policy": "spectrum"},
    "fast, norms left": {"effort": Recovery(batchnorm=False)},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net, train, test, labels = loaded(Path(os.environ["LOWRANK_ASSETS"]) / "cifar10")
    data = list(train[: CALIBRATED + HELD].split(50))
    seen = lowrank.calibrate(net, data, hold_out=HELD / (CALIBRATED + HELD), progress=False)
    seen = lowrank.with_fisher(net, seen)
    images = list(train[:CALIBRATED].split(300))
    was, rows = gathered(net, images), []
    print(f"{'way':20} keep  norms   {'top-1':>6} {'KL':>7}")
    for keep in args.keep:
        for name, options in WAYS.items():
            lean, _ = lowrank.compress(
                net, keep, data=seen, align=1, copy=True, progress=False,
                exclude_modules="conv1|linear", **options,
            )  # fmt: skip
            now = gathered(lean, images)
            for norms, state in (("left", {}), ("anew", now), ("moved", moved(net, now, was))):
                set_moments(lean, state)
                rows.append({
                    "way": name, "keep": keep, "norms": norms,
                    "top1": share(predictions(lean, test), labels),
                    "kl": lowrank.kl(lean, net, seen.held_out),
                })  # fmt: skip
                line = "{way:20} {keep:4.2f}  {norms:6} {top1:7.2f} {kl:7.4f}"
                print(line.format(**rows[-1]), flush=True)
    keep_result("batchnorm", rows, norms=len(batch_norms(net)))


if __name__ == "__main__":
    main()
