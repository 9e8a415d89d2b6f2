"""Concepts of a layer: its features as few non-negative parts, and where in the data they are.

Deep feature factorisation (Collins, Achanta and Süsstrunk, arXiv 1806.10206): the features of all
positions, A (positions, features) ≥ 0, are factored as A ≈ maps · parts; a row of parts is one
concept, a column of maps shows at which positions it is. Features of any sign, which come from no
ReLU, are factored by semi-NMF: maps ≥ 0, parts of any sign. `peek` gives the error by the number of
concepts over the depth of a model, beside that of the same numbers in random order, which no
concept holds together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..calibration.batches import LENGTH, Batch, Data
from ..calibration.statistics import Calibration
from ..errors import LowrankError, unknown
from ..tables import aligned
from ..walk.checks import ordinary_tensors
from ..walk.parts import parts_apart
from ..walk.sites import ALL_LINEAR, Patterns
from .layer_inputs import Read, Tap, batches_of, read_inputs, taps_of

COUNTS = (1, 2, 4, 8)
POSITIONS = 2048  # of which the error is measured, spread over the data
ITERATIONS = 60


@dataclass(frozen=True, eq=False)
class Concepts:
    """The concepts that one layer reads.

    Attributes:
        site: the layer.
        maps: (rows, …, count): how much of each concept is at each position, ≥ 0; the concepts in
            the order of their energy.
        parts: (count, features), of norm 1.
        error: ‖A − maps·parts‖ / ‖A‖.
        signed: whether the features were of any sign.
    """

    site: str
    maps: Tensor
    parts: Tensor
    error: float
    signed: bool


@dataclass(frozen=True, eq=False)
class Peek:
    """Error by number of concepts, one row per layer.

    Attributes:
        counts: numbers of concepts.
        error: relative, (layers, counts), float64; NaN where a layer has fewer features.
        shuffled: the same of each feature's numbers in random order: a control.
    """

    sites: tuple[str, ...]
    counts: tuple[int, ...]
    error: Tensor
    shuffled: Tensor

    def rows(self) -> list[dict[str, str]]:
        """One row per layer, as text: the error, and in brackets that of the control."""
        return [
            {"site": name or "(root)",
             **{str(k): "" if e != e else f"{e:.3f} ({s:.3f})"
                for k, e, s in zip(self.counts, errors, shuffled, strict=True)}}
            for name, errors, shuffled in zip(
                self.sites, self.error.tolist(), self.shuffled.tolist(), strict=True)
        ]  # fmt: skip

    def __str__(self) -> str:
        head = "relative error by number of concepts (in brackets: the numbers shuffled)"
        return "\n".join([head, *aligned(self.rows())])


@ordinary_tensors()
@parts_apart
def concepts(
    model: nn.Module,
    data: Data | Calibration,
    layer: str,
    *,
    count: int = 4,
    tokenizer: Any = None,
    length: int = LENGTH,
    seed: int = 0,
    progress: bool = True,
) -> Concepts:
    """The concepts of what one layer reads; all its inputs are held in memory.

    Args:
        model: unchanged.
        data: as for `compress`, but not a callable; rows of one shape, without padding.
        layer: name of a linear layer or convolution.
        count: of concepts, at most the number of features.

    Raises:
        LowrankError: there is no such layer, the data did not reach it, its inputs are of several
            shapes or padded, or the count is out of range.
    """
    tap = _named(taps_of(model), layer)
    inputs: list[Tensor] = []

    def see(tap: Tap, read: Read) -> None:
        if read.real is not None and not bool(read.real.all()):
            raise LowrankError(f"{tap.title}: concepts are of rows without padding")
        inputs.append(read.features)

    read_inputs(model, [tap], batches_of(data, tokenizer, length), see, progress=progress)
    if len({x.shape[1:] for x in inputs}) != 1:
        raise LowrankError(
            f"{tap.title}: concepts need inputs of one shape, got "
            f"{[tuple(x.shape) for x in inputs[:3]] or 'none'}"
        )
    features = torch.cat(inputs)
    _check_counts([count], features.shape[-1])
    a = features.reshape(-1, features.shape[-1])
    maps, parts, signed = factored_features(a, count, seed=seed)
    error = linalg.relative_error(a, maps, parts)
    return Concepts(layer, maps.view(*features.shape[:-1], count), parts, error, signed)


@ordinary_tensors()
@parts_apart
def peek(
    model: nn.Module,
    data: Data | Calibration,
    *,
    counts: Sequence[int] = COUNTS,
    positions: int = POSITIONS,
    tokenizer: Any = None,
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    length: int = LENGTH,
    seed: int = 0,
    progress: bool = True,
) -> Peek:
    """How well few concepts give the features of every layer, and their shuffled numbers.

    Args:
        model: unchanged.
        counts: numbers of concepts.
        positions: how many of each batch are read at most, evenly spread.
        tokenizer, target_modules, exclude_modules, length, seed: as for `features`.

    Raises:
        LowrankError: as `features`; a count or `positions` is below 1.
    """
    if positions < 1:
        raise LowrankError(f"positions must be at least 1, got {positions}")
    _check_counts(counts, None)
    taps, batches = taps_of(model, target_modules, exclude_modules), batches_of(
        data, tokenizer, length)  # fmt: skip
    seen = _sampled(model, taps, batches, max(positions // len(batches), 1), progress)
    generator = torch.Generator().manual_seed(seed)
    names = [tap.name for tap in taps if tap.name in seen]
    shape = (len(names), len(counts))
    error, control = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))
    for row, name in enumerate(names):
        a = torch.cat(seen[name])
        other = _shuffled(a, generator)
        for column, count in enumerate(counts):
            if count <= min(a.shape):
                for table, matrix in ((error, a), (control, other)):
                    maps, parts, _ = factored_features(matrix, count, seed=seed)
                    table[row, column] = linalg.relative_error(matrix, maps, parts)
    return Peek(tuple(names), tuple(counts), error, control)


def factored_features(a: Tensor, count: int, *, seed: int = 0) -> tuple[Tensor, Tensor, bool]:
    """Maps ≥ 0 (positions, count), parts (count, features) of norm 1, and whether these are signed.

    Args:
        a: (positions, features): by NMF where no number is negative, else by semi-NMF.
    """
    if not bool((a < 0).any()):
        return *linalg.nmf(a, count, seed=seed), False
    maps, parts = linalg.semi_nmf(a, count, iterations=ITERATIONS, seed=seed)
    norms = parts.norm(dim=1)
    maps, parts = maps * norms, parts / norms.clamp(min=torch.finfo(parts.dtype).tiny)[:, None]
    order = maps.square().sum(0).argsort(descending=True, stable=True)
    return maps[:, order], parts[order], True


def _sampled(
    model: nn.Module, taps: Sequence[Tap], batches: Sequence[Batch], most: int, progress: bool
) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}

    def see(tap: Tap, read: Read) -> None:
        rows = read.positions()
        step = -(-len(rows) // most)
        seen.setdefault(tap.name, []).append(rows[::step].float())

    read_inputs(model, taps, batches, see, progress=progress)
    return seen


def _shuffled(a: Tensor, generator: torch.Generator) -> Tensor:
    """Each feature's numbers in an order of its own."""
    order = torch.rand(a.shape, generator=generator).argsort(0).to(a.device)
    return a.gather(0, order)


def _named(taps: Sequence[Tap], layer: str) -> Tap:
    names = {tap.name: tap for tap in taps}
    if layer not in names:
        raise unknown("layer", layer, names)
    return names[layer]


def _check_counts(counts: Sequence[int], width: int | None) -> None:
    for count in counts:
        if count < 1 or (width is not None and count > width):
            most = "" if width is None else f" and at most {width}, the number of features"
            raise LowrankError(f"a number of concepts must be at least 1{most}, got {count}")
    if not counts:
        raise LowrankError("counts must hold at least one number of concepts")
