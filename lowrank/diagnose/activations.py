"""`features`: rank, sparsity and collapse of what every layer reads, over the depth of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..calibration.batches import LENGTH, Batch, Data, rows_in
from ..calibration.statistics import Calibration
from ..errors import LowrankError
from ..linalg import Collapse
from ..walk.checks import ordinary_tensors
from ..walk.parts import parts_apart
from ..walk.sites import ALL_LINEAR, Patterns
from .feature_table import FeatureTable, LayerFeatures
from .layer_inputs import Read, Tap, batches_of, read_inputs, taps_of
from .local_rank import THRESHOLDS, local_ranks
from .spectrum import LayerSpectrum
from .truncation import dropped_at

NEAR = 1e-2  # of the root mean square of a vector


@ordinary_tensors()
@parts_apart
def features(
    model: nn.Module,
    data: Data | Calibration,
    *,
    labels: Tensor | Sequence[int] | None = None,
    loss: float | None = None,
    probes: int = 0,
    tokenizer: Any = None,
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    length: int = LENGTH,
    seed: int = 0,
    progress: bool = True,
) -> FeatureTable:
    """What every linear layer and convolution reads: effective rank, sparsity, collapse.

    Effective and stable rank are of the covariance of the features, a convolution's channels, over
    all positions without padding (as in arXiv 2404.10947). The input of the output head is the last
    feature of the model, that of the first layer the data itself.

    Args:
        model: unchanged; dense or factored.
        data: as for `compress`, but not a callable.
        labels: a class for every row of the data: neural collapse (arXiv 2008.08186), of features
            averaged over the positions of a row.
        loss: in (0, ∞): also the share of features that can be zeroed in all these layers at once
            before the predictions move that far: KL to the model itself in nats per position, or
            relative squared error where it predicts values (see truncation.py).
        probes: number of random directions for the local rank (arXiv 2410.07687) of each layer's
            output, see local_rank.py; 0 leaves it out. It is at most that.
        target_modules, exclude_modules: as for `compress`; by default all layers, the head too.
        tokenizer, length: as for `compress`.
        seed: of the probes.

    Raises:
        LowrankError: there is no data, a pattern matches nothing, there is not one label for each
            row, or an option is out of range.
    """
    if loss is not None and not loss > 0:
        raise LowrankError(f"loss must be positive, got {loss}")
    if probes < 0:
        raise LowrankError(f"probes must be at least 0, got {probes}")
    taps = taps_of(model, target_modules, exclude_modules)
    batches = batches_of(data, tokenizer, length)
    classes = None if labels is None else _classes(labels, batches)
    tallies = {tap.name: Tally(classes) for tap in taps}
    read_inputs(model, taps, batches, lambda tap, r: tallies[tap.name].add(r), progress=progress)
    local = local_ranks(model, taps, batches, probes, seed=seed) if probes else {}
    dropped: dict[str, float] = {}
    measure = ""
    if loss is not None:
        dropped, measure = dropped_at(model, taps, batches, loss, progress=progress)
    sites = [
        tallies[tap.name].figures(tap, dropped.get(tap.name), local.get(tap.name, {}))
        for tap in taps
    ]
    rows = sum(map(rows_in, batches))
    return FeatureTable(tuple(sites), rows, loss, measure, probes, THRESHOLDS if probes else ())


class Tally:
    """Running sums over what one layer reads."""

    def __init__(self, classes: Tensor | None) -> None:
        self.classes = classes
        self.count = self.zeros = self.near = 0
        self.total: Tensor | None = None
        self.gram: Tensor | None = None
        self.pooled: list[Tensor] = []
        self.places: list[Tensor] = []

    def add(self, read: Read) -> None:
        x = read.positions()
        if not len(x):
            return
        self.count += len(x)
        size = x.float().abs()
        self.zeros += int((size == 0).sum())
        floor = NEAR * size.square().mean(-1, keepdim=True).sqrt()
        self.near += int((size <= floor).sum())
        sums = x.double().sum(0)
        self.total = sums if self.total is None else self.total + sums
        self.gram = linalg.gram_sum(x, self.gram)
        if self.classes is not None and read.by_row:
            self.pooled.append(_pooled(read))
            self.places.append(torch.arange(read.start, read.start + len(read.features)))

    def figures(self, tap: Tap, dropped: float | None, local: dict[float, float]) -> LayerFeatures:
        if self.total is None or self.gram is None:
            reason = "the data did not reach it"
            return LayerFeatures(tap.name, 0, reason=reason)
        mean, width = self.total / self.count, len(self.total)
        covariance = self.gram / self.count - mean.outer(mean)
        energy = torch.linalg.eigvalsh(covariance).clamp(min=0).flip(0).cpu()
        numbers = self.count * width
        return LayerFeatures(
            tap.name, width, self.count, LayerSpectrum(energy), self.zeros / numbers,
            self.near / numbers, dropped, self._collapse(), local,
        )  # fmt: skip

    def _collapse(self) -> Collapse | None:
        if self.classes is None or not self.pooled:
            return None
        labels = self.classes[torch.cat(self.places)]
        return linalg.neural_collapse(torch.cat(self.pooled), labels)


def _pooled(read: Read) -> Tensor:
    """(rows, features) float64 on the CPU: the mean over the real positions of each row."""
    x = read.features.double()
    if x.ndim == 2:
        return x.cpu()
    if read.real is None:
        return x.flatten(1, -2).mean(1).cpu()
    weight = read.real.double()[..., None]
    summed = (x * weight).flatten(1, -2).sum(1)
    return (summed / weight.flatten(1, -2).sum(1).clamp(min=1)).cpu()


def _classes(labels: Any, batches: Sequence[Batch]) -> Tensor:
    classes = torch.as_tensor(labels).cpu()
    rows = sum(map(rows_in, batches))
    if classes.shape != (rows,) or classes.is_floating_point():
        raise LowrankError(
            f"labels must be one integer for each of the {rows} rows of the data, got "
            f"{classes.dtype} of shape {tuple(classes.shape)}"
        )
    return classes
