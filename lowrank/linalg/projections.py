"""Random subspaces: P (size, dimension) from a seed, applied to few coordinates, never stored.

`dense` and `sparse` have columns of norm one over all parameters together, as in Li et al. (arXiv
1804.08838); `fastfood` (Le, Sarlós and Smola, arXiv 1408.3060) takes size · log(size) operations
instead of size · dimension. `kaiming` is PRANC's (arXiv 2206.08464): each column is an
initialisation of the network, uniform within each tensor's own bound.

`times` and `transposed` are for training, in float32 and in any order of summation. `exact` gives
the same numbers bit for bit everywhere: float64, one operation at a time, sums in the order of the
coordinates; no product of matrices, whose order of summation depends on library and threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import LowrankError, unknown
from . import counter

KEPT = 1 << 31  # bytes of columns that are kept; more are drawn anew each time
CHUNK = 1 << 22  # numbers drawn at a time
START = 0  # stream of the starting point; those of the columns follow


class Projection(Protocol):
    """P of `size` rows and `dimension` columns."""

    size: int
    dimension: int

    def times(self, z: Tensor) -> Tensor:
        """P z, (size,), in the dtype and on the device of z (dimension,)."""

    def transposed(self, g: Tensor) -> Tensor:
        """Pᵀ g, (dimension,), of g (size,)."""

    def exact(self, z: Tensor) -> Tensor:
        """P z, (size,) float64 on the CPU, the same bytes on every machine."""


class Dense:
    """Columns of bell-shaped numbers, of norm one; or uniform ones within bounds."""

    def __init__(self, size: int, dimension: int, seed: int, bounds: Tensor | None = None) -> None:
        """
        Args:
            bounds: (size,) float64; None for columns of norm one.
        """
        self.size, self.dimension, self.seed, self._bounds = size, dimension, seed, bounds
        self._kept: Tensor | None = None

    def times(self, z: Tensor) -> Tensor:
        parts = (z[start : start + len(rows)] @ rows for start, rows in self._rows(z))
        total = next(parts)
        for part in parts:
            total = total + part
        return total

    def transposed(self, g: Tensor) -> Tensor:
        return torch.cat([rows @ g for _, rows in self._rows(g)])

    def exact(self, z: Tensor) -> Tensor:
        values, total = z.double().tolist(), torch.zeros(self.size, dtype=torch.float64)
        for start, rows in self._drawn():
            for value, row in zip(values[start : start + len(rows)], rows, strict=True):
                total += row * value
        return total

    def _rows(self, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Columns of P as rows, by their first index, in the dtype of a tensor."""
        if self.size * self.dimension * like.element_size() > KEPT:
            yield from ((start, rows.to(like)) for start, rows in self._drawn())
            return
        if self._kept is None or (self._kept.dtype, self._kept.device) != (like.dtype, like.device):
            self._kept = like.new_empty(self.dimension, self.size)
            for start, rows in self._drawn():
                self._kept[start : start + len(rows)] = rows
        yield 0, self._kept

    def _drawn(self) -> Iterator[tuple[int, Tensor]]:
        step = max(CHUNK // self.size, 1)
        for start in range(0, self.dimension, step):
            count = min(step, self.dimension - start)
            keys = counter.keys_of(self.seed, START + 1 + start, count)
            drawn = counter.splitmix(keys, 0, self.size)
            if self._bounds is not None:
                unit = torch.from_numpy(counter.uniforms(drawn)).double() / counter.WIDE
                yield start, unit * self._bounds
                continue
            numbers = counter.bell(drawn)
            norms = [math.sqrt(int(n)) or 1.0 for n in (numbers**2).sum(1)]
            yield (
                start,
                torch.from_numpy(numbers).double()
                / torch.tensor(norms, dtype=torch.float64)[:, None],
            )


class Sparse:
    """Columns of √size entries ± one value, one entry in each of as many equal parts."""

    def __init__(self, size: int, dimension: int, seed: int) -> None:
        self.size, self.dimension = size, dimension
        entries = math.isqrt(size) or 1
        edges = np.arange(entries + 1, dtype=np.uint64) * np.uint64(size) // np.uint64(entries)
        drawn = counter.splitmix(counter.keys_of(seed, START + 1, dimension), 0, entries)
        low = drawn & np.uint64(0xFFFFFFFF)
        self._places = torch.from_numpy((edges[:-1] + low % np.diff(edges)).astype(np.int64))
        self._signs = torch.from_numpy(counter.signs(drawn)).double() / math.sqrt(entries)

    def times(self, z: Tensor) -> Tensor:
        values = self._signs.to(z) * z[:, None]
        total = z.new_zeros(self.size)
        return total.index_add(0, self._places.to(z.device).flatten(), values.flatten())

    def transposed(self, g: Tensor) -> Tensor:
        return (g[self._places.to(g.device)] * self._signs.to(g)).sum(1)

    def exact(self, z: Tensor) -> Tensor:
        total = torch.zeros(self.size, dtype=torch.float64)
        for value, places, row in zip(z.double().tolist(), self._places, self._signs, strict=True):
            total[places] += row * value  # the places of one column differ
        return total


class Fastfood:
    """P z = c · H G Π H B z, cut to `size`: H Hadamard, B signs, Π a permutation, G a bell."""

    def __init__(self, size: int, dimension: int, seed: int) -> None:
        self.size, self.dimension = size, dimension
        self._length = 1 << max(size - 1, 1).bit_length()
        drawn = [counter.words(seed, START + 1 + n, self._length) for n in range(3)]
        self._signs = torch.from_numpy(counter.signs(drawn[0])).double()
        self._order = torch.from_numpy(np.argsort(drawn[1], kind="stable"))
        bell = counter.bell(drawn[2])
        self._bell = torch.from_numpy(bell).double()
        # H H = length: so that columns have norm one, on average over which rows are kept.
        self._scale = 1 / (math.sqrt(self._length * int((bell**2).sum()))
                           * math.sqrt(size / self._length))  # fmt: skip

    def times(self, z: Tensor) -> Tensor:
        signs, order, bell = self._on(z)
        padded = z.new_zeros(self._length)
        padded[: self.dimension] = z * signs[: self.dimension]
        return hadamard(hadamard(padded)[order] * bell)[: self.size] * self._scale

    def transposed(self, g: Tensor) -> Tensor:
        signs, order, bell = self._on(g)
        padded = g.new_zeros(self._length)
        padded[: self.size] = g
        inner = torch.empty_like(padded)
        inner[order] = hadamard(padded) * bell
        return (hadamard(inner) * signs)[: self.dimension] * self._scale

    def exact(self, z: Tensor) -> Tensor:
        # Sums of two numbers and products of two: there is one order only.
        return self.times(z.double().cpu())

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._signs.to(like), self._order.to(like.device), self._bell.to(like)


def hadamard(x: Tensor) -> Tensor:
    """H x, of a length that is a power of two: unnormalised, symmetric, H H = length."""
    width = 1
    while width < len(x):
        pairs = x.view(-1, 2, width)
        x = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).flatten()
        width *= 2
    return x


PROJECTIONS: dict[str, Callable[[int, int, int, Tensor], Projection]] = {
    "dense": lambda size, dimension, seed, bounds: Dense(size, dimension, seed),
    "sparse": lambda size, dimension, seed, bounds: Sparse(size, dimension, seed),
    "fastfood": lambda size, dimension, seed, bounds: Fastfood(size, dimension, seed),
    "kaiming": Dense,
}


def projection(kind: str, dimension: int, seed: int, bounds: Tensor) -> Projection:
    """P of a kind, for as many parameters as there are bounds.

    Args:
        bounds: (size,) float64: of a uniform initialisation of each parameter.

    Raises:
        LowrankError: the kind is unknown, or the dimension not in [1, size].
    """
    if kind not in PROJECTIONS:
        raise unknown("projection", kind, PROJECTIONS)
    if not 1 <= dimension <= len(bounds):
        raise LowrankError(f"dimension must be in [1, {len(bounds)}], the number of parameters, "
                           f"got {dimension}")  # fmt: skip
    return PROJECTIONS[kind](len(bounds), dimension, seed, bounds)


def starting_point(seed: int, bounds: Tensor) -> Tensor:
    """A uniform initialisation within the bounds, (size,) float64, the same bytes everywhere."""
    drawn = counter.uniforms(counter.words(seed, START, len(bounds)))
    return torch.from_numpy(drawn).double() / counter.WIDE * bounds
