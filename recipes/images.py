"""Small image sets for the recipes: MNIST's own files where given, else scikit-learn's digits."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Images(NamedTuple):
    """Images (N, channels, height, width), standardised, and their classes (N,)."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(side: int = 28) -> Images:
    """scikit-learn's 1,797 digits of 8×8, upscaled; every fifth of a shuffle is for the test."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    if side != 8:
        x = nn.functional.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    x = (x - x.mean()) / x.std()
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[::5], torch.cat([order[i::5] for i in range(1, 5)])
    name = "digits of scikit-learn" + (f", upscaled to {side}×{side}" if side != 8 else "")
    return Images(name, x[train], y[train], x[test], y[test])


def mnist(folder: str | Path) -> Images:
    """The four idx files as they are distributed, packed or not."""
    x, y, test_x, test_y = (
        _idx(Path(folder), f"{part}-{kind}")
        for part in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    mean, deviation = x.float().mean(), x.float().std()
    x, test_x = ((t.float()[:, None] - mean) / deviation for t in (x, test_x))
    return Images("MNIST", x, y.long(), test_x, test_y.long())


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images classified rightly."""
    was = model.training
    model.eval()
    pairs = zip(x.split(500), y.split(500), strict=True)
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in pairs)
    model.train(was)
    return right / len(y)


def weights(model: nn.Module) -> int:
    """Numbers in weights of convolutions and linear layers; biases and norms are not counted."""
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


def _idx(folder: Path, name: str) -> Tensor:
    plain, packed = folder / name, folder / f"{name}.gz"
    raw = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    sizes = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    start = 4 + 4 * len(sizes)
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).reshape(sizes)
