"""Small nets of torch's fused modules, trained here on real data, and what compression leaves.

    python benchmarks/fused.py [--ratios 0.4 0.2] [--only NAME …]     # needs scikit-learn
        [--text WIKITEXT --images CIFAR.npz]       # default: below the folder LOWRANK_ASSETS

LSTM and TransformerEncoder: which of four kinds of text 96 bytes are (Wikipedia, stories, Python,
its documentation). GRU: the next byte of Wikipedia. MobileNetV2 (of transformers, a quarter of its
width): scikit-learn's digits at 32 × 32. U-Net with transposed convolutions: images of CIFAR-10
without the noise added to them. Each is trained for a minute or two, compressed with 512 training
rows, and judged on rows that were not trained on. "kept" is of all parameters of the model, "time"
of the dense model's. Two threads, float32.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import keep
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank

LENGTH, NOISE = 96, 0.2
WAYS: dict[str, dict[str, Any]] = {
    "svd": {"data": None, "policy": "uniform", "storage": "factors"},
    "default": {},
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
}


class Task(NamedTuple):
    """A net, its training rows, those it is judged on, and how: higher is better."""

    net: nn.Module
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    measure: str
    steps: int
    batch: int = 64


class Classifier(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.rnn = nn.LSTM(64, width, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(self.embedding(ids))[0].mean(1))
        return logits


class NextByte(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.rnn = nn.GRU(64, width, 2, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(self.embedding(ids))[0])
        return logits


class Encoder(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.place = nn.Parameter(torch.randn(LENGTH, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.encoder(self.embedding(ids) + self.place)
        logits: Tensor = self.head(states.mean(1))
        return logits


class UNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        wide = (width, 2 * width, 4 * width)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(wide)
        )
        self.middle = nn.Conv2d(wide[-1], wide[-1], 3, padding=1)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 4, stride=2, padding=1)
            for a, b in reversed(list(itertools.pairwise(wide)))
        )
        self.join = nn.ModuleList(nn.Conv2d(2 * a, a, 3, padding=1) for a in reversed(wide[:-1]))
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        levels = [self.first(image).relu()]
        for down in self.down:
            levels.append(down(levels[-1]).relu())
        x = self.middle(levels.pop()).relu()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x).relu(), levels.pop()], dim=1)).relu()
        output: Tensor = image + self.last(x)
        return output


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

        config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=10)
        self.net = MobileNetV2ForImageClassification(config)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.net(image).logits
        return logits


def _bytes(text: str) -> Tensor:
    raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return raw[: len(raw) // LENGTH * LENGTH].view(-1, LENGTH)


def _parted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A fifth is for the test, at least 512 rows or a third."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held = min(max(len(x) // 5, 512), len(x) // 3)
    return x[order[held:]], y[order[held:]], x[order[:held]], y[order[:held]]


def _share(output: Tensor, y: Tensor) -> float:
    return 100 * float((output.argmax(-1) == y).float().mean())


def _wiki(folder: Path, name: str) -> str:
    return (folder / f"wikitext2_{name}.txt").read_text("utf-8")


def _kinds(text: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of four kinds of text, and which they are."""
    from pydoc_data import topics

    root = Path(sysconfig.get_path("stdlib"))
    code = "".join(p.read_text("utf-8", "replace") for p in sorted(root.glob("*.py"))[:60])
    stories = (text / "stories260K_selfgenerated.txt").read_text("utf-8")
    kinds = [_wiki(text, "valid"), stories, code, "".join(topics.topics.values())]
    rows = [_bytes(kind)[:1600] for kind in kinds]
    y = torch.cat([torch.full((len(part),), i) for i, part in enumerate(rows)])
    return _parted(torch.cat(rows), y)


def lstm(text: Path) -> Task:
    return Task(Classifier(160, 4), *_kinds(text), F.cross_entropy, _share, "% right", 250)


def encoder(text: Path) -> Task:
    return Task(Encoder(128, 4), *_kinds(text), F.cross_entropy, _share, "% right", 400)


def _next(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


def gru(text: Path) -> Task:
    rows, test = _bytes(_wiki(text, "valid")), _bytes(_wiki(text, "test"))[:600]
    data = (rows[:, :-1], rows[:, 1:], test[:, :-1], test[:, 1:])
    return Task(NextByte(320), *data, _next, _share, "% of bytes", 300)


def mobile(_: Path) -> Task:
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    x = F.interpolate(x, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    parts = _parted(x, torch.tensor(raw.target))
    return Task(Mobile(), *parts, F.cross_entropy, _share, "% right", 250)


def unet(images: Path) -> Task:
    import numpy as np

    held = np.load(images)
    draw = torch.Generator().manual_seed(0)

    def rows(name: str) -> tuple[Tensor, Tensor]:
        clean = torch.tensor(held[name]).permute(0, 3, 1, 2).float() / 255
        return clean + NOISE * torch.randn(clean.shape, generator=draw), clean

    names = [n for n in held.files if held[n].ndim == 4]
    train, test = (next(n for n in names if part in n) for part in ("train", "test"))

    def decibels(output: Tensor, y: Tensor) -> float:
        return float(-10 * (output - y).square().mean().log10())

    return Task(UNet(24), *rows(train), *rows(test), F.mse_loss, decibels, "dB", 800, 32)


def train(task: Task) -> None:
    task.net.train()
    optimizer = torch.optim.AdamW(task.net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=task.steps)
    draw = torch.Generator().manual_seed(0)
    for _ in range(task.steps):
        chosen = torch.randint(0, len(task.x), (task.batch,), generator=draw)
        optimizer.zero_grad()
        task.loss(task.net(task.x[chosen]), task.y[chosen]).backward()
        nn.utils.clip_grad_norm_(task.net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    task.net.eval()


def judged(task: Task, net: nn.Module) -> float:
    with torch.no_grad():
        output = torch.cat([net(part) for part in task.test_x.split(128)])
    return task.score(output, task.test_y)


def main() -> None:
    assets = Path(os.environ.get("LOWRANK_ASSETS", "."))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4, 0.2])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--text", type=Path, default=assets / "text")
    image_file = assets / "cifar10" / "cifar10_subset.npz"
    parser.add_argument("--images", type=Path, default=image_file)
    given = parser.parse_args()
    torch.set_num_threads(2)
    tasks: dict[str, tuple[Callable[[Path], Task], Path]] = {
        "LSTM": (lstm, given.text),
        "GRU": (gru, given.text),
        "TransformerEncoder": (encoder, given.text),
        "MobileNetV2": (mobile, given.text),
        "U-Net": (unet, given.images),
    }
    rows = []
    for name in given.only or tasks:
        make, source = tasks[name]
        torch.manual_seed(0)
        start = time.perf_counter()
        task = make(source)
        train(task)
        dense, size = judged(task, task.net), sum(p.numel() for p in task.net.parameters())
        seconds = time.perf_counter() - start
        print(
            f"{name}: {size:,} parameters, {dense:.2f} {task.measure}, {seconds:.0f} s", flush=True
        )
        rows.append({"net": name, "way": "dense", "parameters": size, "score": dense,
                     "measure": task.measure})  # fmt: skip
        data = list(task.x[:512].split(64))
        for ratio in given.ratios:
            for way, options in WAYS.items():
                start = time.perf_counter()
                small, report = lowrank.compress(
                    task.net, ratio, copy=True, progress=False, **{"data": data, **options}
                )
                seconds = time.perf_counter() - start
                score = judged(task, small)
                time_ratio = lowrank.benchmark(
                    small, task.test_x[: task.batch], reference=task.net, repeats=5
                ).time_ratio
                kept = sum(p.numel() for p in small.parameters()) / size
                rows.append({"net": name, "way": way, "ratio": ratio, "achieved": report.achieved,
                             "kept": kept, "score": score, "time": time_ratio,
                             "seconds": seconds})  # fmt: skip
                print(f"  {ratio} {way:9} kept {kept:.3f}  {score:6.2f} {task.measure}  "
                      f"time {time_ratio:.2f}  {seconds:.0f} s", flush=True)  # fmt: skip
    if not given.only:
        keep("fused", rows)


if __name__ == "__main__":
    main()
