"""Convolutions in factored forms that lose nothing: factors by NumPy, per group."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from lowrank.nn import ChannelConv, CPConv, SpatialConv, TubalConv, TuckerConv

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Array = np.ndarray


def conv(dims: int, inputs: int = 4, outputs: int = 6, kernel: Any = 3, **options: Any) -> Any:
    """A convolution in float64, drawn by the seed of the test."""
    return CONVS[dims - 1](inputs, outputs, kernel, **{"dtype": torch.float64, **options})


def blocks(layer: Any) -> list[Array]:
    """The weight of every group (O/g, I/g, *kernel)."""
    return np.split(layer.weight.detach().double().numpy(), layer.groups)


def split(matrix: Array) -> tuple[Array, Array]:
    """Two factors of a matrix, of its full rank."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u * s, v


def stacked(parts: list[Array]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))


def channel_first(layer: Any) -> ChannelConv:
    ups, downs = zip(*(split(w.reshape(len(w), -1)) for w in blocks(layer)), strict=True)
    return ChannelConv.from_factors(layer, stacked(downs), stacked(ups))


def channel_last(layer: Any) -> ChannelConv:
    ups, downs = [], []
    for w in blocks(layer):
        cube = w.reshape(*w.shape[:2], -1)
        up, down = split(cube.transpose(0, 2, 1).reshape(-1, w.shape[1]))
        ups.append(up.reshape(len(w), -1, up.shape[1]).transpose(0, 2, 1))
        downs.append(down)
    return ChannelConv.from_factors(layer, stacked(downs), stacked(ups), wide="last")


def spatial(layer: Any) -> SpatialConv:
    ups, downs = [], []
    for w in blocks(layer):
        out, into, height, width = w.shape
        up, down = split(w.transpose(0, 3, 1, 2).reshape(out * width, into * height))
        ups.append(up.reshape(out, width, -1).transpose(0, 2, 1))
        downs.append(down.reshape(-1, into, height))
    return SpatialConv.from_factors(layer, stacked(downs), stacked(ups))


def cp(layer: Any) -> CPConv:
    """One component for every number under the kernel of every channel."""
    lasts, firsts, taps = [], [], [[] for _ in layer.kernel_size]
    for w in blocks(layer):
        places = np.array(list(np.ndindex(*w.shape[1:])))
        lasts.append(w.reshape(len(w), -1))
        firsts.append(np.eye(w.shape[1])[places[:, 0]])
        for axis, size in enumerate(layer.kernel_size):
            taps[axis].append(np.eye(size)[places[:, 1 + axis]])
    return CPConv.from_factors(layer, stacked(lasts), [stacked(t) for t in taps], stacked(firsts))


def tucker(layer: Any) -> TuckerConv:
    """Random orthogonal bases of the channels, and the core in them."""
    rng, lasts, cores, firsts = np.random.default_rng(3), [], [], []
    for w in blocks(layer):
        out = np.linalg.qr(rng.standard_normal((len(w), len(w))))[0]
        into = np.linalg.qr(rng.standard_normal((w.shape[1], w.shape[1])))[0]
        lasts.append(out)
        firsts.append(into.T)
        cores.append(np.einsum("oi...,op,ij->pj...", w, out, into))
    return TuckerConv.from_parts(layer, stacked(lasts), stacked(cores), stacked(firsts))


def waves(kernel: Any) -> Array:
    """(K, K): cosines along each axis, number by number; columns are frequencies."""
    places = list(np.ndindex(*kernel))
    found = np.ones((len(places), len(places)))
    for (row, tap), (column, wave) in itertools.product(enumerate(places), repeat=2):
        for size, k, f in zip(kernel, tap, wave, strict=True):
            found[row, column] *= np.cos(np.pi * (2 * k + 1) * f / (2 * size))
            found[row, column] *= (2 / size if f else 1 / size) ** 0.5
    return found


def tubal(layer: Any) -> TubalConv:
    """Every frequency of every group at its full rank."""
    ups, downs = [], []
    for w in blocks(layer):
        slices = (w.reshape(*w.shape[:2], -1) @ waves(layer.kernel_size)).transpose(2, 0, 1)
        up, down = zip(*map(split, slices), strict=True)
        ups.append(np.concatenate(up, axis=1))
        downs.append(np.concatenate(down))
    ranks = [len(part) for part in down]
    return TubalConv.from_factors(layer, stacked(downs), stacked(ups), ranks)


# Name -> a form that stands for the whole; those of two dimensions only are named in PLANE.
WHOLE: dict[str, Callable[[Any], Any]] = {
    "channel": channel_first,
    "mirror": channel_last,
    "spatial": spatial,
    "cp": cp,
    "tucker": tucker,
    "tubal": tubal,
}
PLANE = frozenset({"spatial"})
