"""One layer at a time: put factors in its place, compare predictions, put it back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.running import forward, logits_of, mask_of, quiet
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError
from ..measure.eval import divergence
from ..types import Curve, Method, Option, Site
from ..walk.surgery import replaced
from .sensitivity_table import Sensitivity


def measure(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[Site],
    way: Method,
    seen: Calibration | None,
    ratios: tuple[float, ...],
    progress: bool,
) -> Sensitivity:
    from tqdm.auto import tqdm

    kl = torch.full((len(targets), len(ratios)), torch.nan, dtype=torch.float64)
    rank, error = torch.zeros_like(kl, dtype=torch.int64), torch.full_like(kl, torch.nan)
    with quiet(model):
        dense = [logits_of(forward(model, batch)) for batch in batches]
        bar = tqdm(targets, "sensitivity", delay=2, disable=not progress, leave=False)
        for row, site in enumerate(bar):
            stats = statistics_of(site, seen)
            if way.needs and stats.count == 0:
                continue  # the calibration did not reach it: its row stays NaN
            curve = way.curve(site, stats)
            for column, ratio in enumerate(ratios):
                option = _option(curve, ratio)
                if option is None or option.size is None:
                    continue
                new = way.factor(site.module, option, stats).eval()
                with replaced(model, site, new) as root:
                    kl[row, column] = _distance(root, batches, dense)
                rank[row, column] = option.size[0]
                error[row, column] = option.error / curve.total if curve.total > 0 else 0.0
    positions = sum(_positions(*each) for each in zip(batches, dense, strict=True))
    names = tuple(site.name for site in targets)
    return Sensitivity(names, ratios, kl, rank, error, name_of(way), positions)


def _option(curve: Curve, ratio: float) -> Option | None:
    """The largest factored option that keeps at most this share of the dense parameters."""
    limit = ratio * curve.dense.cost.params
    fitting = [o for o in curve.options if not o.dense and o.cost.params <= limit]
    return fitting[-1] if fitting else None


def _distance(model: nn.Module, batches: Sequence[Batch], dense: Sequence[Tensor]) -> float:
    total, count = 0.0, 0
    for batch, want in zip(batches, dense, strict=True):
        each = divergence(want, logits_of(forward(model, batch)), mask_of(batch))
        total, count = total + float(each.double().sum()), count + each.numel()
    if count == 0:
        raise LowrankError("there is no position to compare: the data is empty, or all padding")
    return total / count


def _positions(batch: Batch, logits: Tensor) -> int:
    mask = mask_of(batch)
    return logits[..., 0].numel() if mask is None else int(mask.sum())


def name_of(way: Method) -> str:
    return type(way).__name__.lower()
