"""ResNet-20 on CIFAR-10, compressed after training: by weights, by outputs, refitted, trained.

    LOWRANK_ASSETS=… python recipes/compress_resnet_cifar.py [--keep 0.9 0.7 0.5 0.3]
                                  [--ways NAME …] [--train 0.5 0.3] [--export] [--threads 1]

Budget: parameters of all convolutions but the first. Calibration on 1500 train images without
labels; 500 more are held out, and whatever is chosen is chosen by the KL to the dense net there.
Top-1 on 761 test images, of which one standard error is 1 point; agree: share of them on which
dense and compressed net say the same; macs: products an image; images/s of batches of 64, beside
the dense net's (medians of alternating runs). The ways with steps train factors and norms to the
dense net's outputs, without labels. --export runs the compressed nets through torch.export and
onnxruntime too. The folder holds cifar10/resnet20.safetensors and cifar10/cifar10_subset.npz.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad, relu

import lowrank
from lowrank import Recovery
from lowrank.measure.timing import paired_ratio
from lowrank.nn import TubalConv

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import keep as keep_result

CALIBRATED, HELD = 1500, 500
UNIFORM = {"policy": "uniform"}
WAYS: dict[str, dict[str, Any]] = {
    "svd, uniform": {"method": "svd", **UNIFORM},
    "svd, spectrum": {"method": "svd", "policy": "spectrum"},
    "tucker, uniform": {"method": "tucker", **UNIFORM},
    "spatial, uniform": {"method": "spatial", **UNIFORM},
    "spatial, spectrum": {"method": "spatial", "policy": "spectrum"},
    "whitened channels, uniform": {"method": "whitened-channel", **UNIFORM},
    "whitened, uniform": {"method": "whitened", **UNIFORM},
    "whitened, spectrum": {"method": "whitened", "policy": "spectrum"},
    "two-sided, spectrum": {"method": "two-sided", "policy": "spectrum"},
    "fast": {"effort": "fast"},
    "stored, fast": {"method": "two-sided-stored", "effort": "fast"},
}
TRAINED: dict[str, dict[str, Any]] = {
    "block refit, 60 steps": {"effort": Recovery(block_steps=60, rows=50)},
    "distilled, 400 steps": {"effort": Recovery(distill_steps=400, rows=50)},
    "both": {"effort": Recovery(block_steps=60, distill_steps=400, rows=50)},
    "stored, distilled, 400 steps": {
        "method": "two-sided-stored",
        "effort": Recovery(
            distill_steps=400, distill_rate=6e-4, optimizer="adamw", rows=50, augment=True
        ),
    },
}


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut that drops positions and adds empty channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.more = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return relu(y + x)


class ResNet20(nn.Module):
    """He et al. (arXiv 1512.03385), section 4.2, shortcuts of type A; images (B, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.7, 0.5, 0.3])
    parser.add_argument("--ways", nargs="+", default=[*WAYS, *TRAINED], choices=[*WAYS, *TRAINED])
    parser.add_argument("--train", type=float, nargs="*", default=[0.5, 0.3])
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if "LOWRANK_ASSETS" not in os.environ:
        sys.exit("set LOWRANK_ASSETS to the folder that holds cifar10/resnet20.safetensors")
    torch.set_num_threads(args.threads)
    net, train, test, labels = loaded(Path(os.environ["LOWRANK_ASSETS"]) / "cifar10")
    said, size = predictions(net, test), sum(p.numel() for p in net.parameters())
    print(f"dense: top-1 {share(said, labels):.2f} %, {size:,} parameters, {macs(net):,} macs")
    data = list(train[: CALIBRATED + HELD].split(50))
    started = time.perf_counter()
    seen = lowrank.calibrate(net, data, hold_out=HELD / (CALIBRATED + HELD), progress=False)
    seen = lowrank.with_fisher(net, seen)
    print(f"statistics: {time.perf_counter() - started:.1f} s", flush=True)
    print(
        f"{'way':28} {'keep':>4} {'kept':>6} {'params':>8} {'macs':>11} {'top-1':>6} {'agree':>6} "
        f"{'speed':>6} {'s':>6}"
    )
    rows: list[dict[str, Any]] = []
    for keep in args.keep:
        for name in (name for name in args.ways if name in WAYS or keep in args.train):
            options = {**WAYS, **TRAINED}[name]
            started = time.perf_counter()
            lean, report = lowrank.compress(
                net, keep, data=seen, align=1, copy=True, progress=False,
                exclude_modules="conv1|linear", **options,
            )  # fmt: skip
            seconds, now = time.perf_counter() - started, predictions(lean, test)
            faster = 1 / paired_ratio(partial(lean, test[:64]), partial(net, test[:64]))
            rows.append({
                "way": name, "keep": keep, "kept": report.achieved, "params": report.params_after,
                "macs": macs(lean), "top1": share(now, labels), "agree": share(now, said),
                "speed": faster, "seconds": seconds, "notes": report.notes,
                "gains": [asdict(gain) for gain in report.gains],
            })  # fmt: skip
            line = "{way:28} {keep:4.2f} {kept:6.4f} {params:8,} {macs:11,} {top1:6.2f} "
            line += "{agree:6.2f} {speed:6.2f} {seconds:6.1f}"
            print(line.format(**rows[-1]), flush=True)
            if args.export:
                print("  largest differences after export: {} onnxruntime: {}".format(*off(lean)))
    keep_result(
        "resnet20", rows, dense=share(said, labels), dense_macs=macs(net), dense_params=size
    )


def loaded(folder: Path) -> tuple[ResNet20, Tensor, Tensor, Tensor]:
    """The trained net, train images, test images and their classes."""
    net = ResNet20().eval()
    net.load_state_dict(load_file(folder / "resnet20.safetensors"))
    with np.load(folder / "cifar10_subset.npz") as stored:
        train, test = normalised(stored["x_train"]), normalised(stored["x_test"])
        return net, train, test, torch.from_numpy(stored["y_test"]).long()


@torch.no_grad()
def macs(net: nn.Module) -> int:
    """Multiply-accumulates of one image in all convolutions and linear layers; the kernels of those
    stored by frequency, which are built once a batch, are not counted."""
    found = []

    def hook(module: Any, _inputs: Any, output: Tensor) -> None:
        positions = output[0].numel() // output.shape[1]
        each = module.cost().macs if isinstance(module, TubalConv) else module.weight.numel()
        found.append(each * positions)

    parts = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear | TubalConv)]
    handles = [part.register_forward_hook(hook) for part in parts]
    net(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    return sum(found)


@torch.no_grad()
def off(net: nn.Module) -> tuple[str, str]:
    """How far torch.export's program and onnxruntime's session are from the net itself."""
    import onnxruntime

    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want, program = net(x), torch.export.export(net, (x,))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "net.onnx")
        torch.onnx.export(net, (x,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        other = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    return tuple(f"{float((y - want).abs().max()):.1e}" for y in (program.module()(x), other))


def normalised(images: Any) -> Tensor:
    """(N, 32, 32, 3) uint8 -> (N, 3, 32, 32), as the net was trained."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def predictions(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(part) for part in images.split(256)]).argmax(1)


def share(said: Tensor, truth: Tensor) -> float:
    """Per cent."""
    return 100 * float((said == truth).float().mean())


if __name__ == "__main__":
    main()
