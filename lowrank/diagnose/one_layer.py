"""Factor one layer or group at a time, compare predictions, and restore it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from ..calibration.batches import Batch
from ..calibration.running import quiet
from ..calibration.statistics import Calibration, statistics_of
from ..measure.eval import Reference
from ..methods.resolved import Group, Resolved
from ..plans.progress import steps
from ..types import Curve, Option
from ..walk.surgery import replaced, twin
from .sensitivity_table import Sensitivity


def measure_alone(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[Group],
    resolved: Resolved,
    calibration: Calibration | None,
    ratios: tuple[float, ...],
    *,
    data_free: bool,
    progress: bool,
) -> Sensitivity:
    """KL of the model when one group alone is compressed to each of the ratios.

    Args:
        groups: sites that share a basis; most have one site.
        data_free: measure sites that the calibration did not reach with plain SVD; otherwise their
            rows are NaN.
    """
    kl = torch.full((len(groups), len(ratios)), torch.nan, dtype=torch.float64)
    rank, error = torch.zeros_like(kl, dtype=torch.int64), torch.full_like(kl, torch.nan)
    dense = Reference(twin(model), batches)  # the twin stays dense
    with quiet(model):
        for row, group in enumerate(steps(groups, "layer", progress)):
            if not data_free and not resolved.is_seen(group[0], calibration):
                continue
            curve = resolved.curve(group, calibration)
            if resolved.is_seen(group[0], calibration):
                resolved = resolved.knowing([curve])
            for column, ratio in enumerate(ratios):
                option = _option(curve, ratio)
                if option is None or option.size is None:
                    continue
                kl[row, column] = _loss(model, group, option, resolved, calibration, dense)
                rank[row, column] = option.size[0]
                error[row, column] = option.error / curve.total if curve.total > 0 else 0.0
    positions = sum(_positions(dense, number) for number in range(len(batches)))
    names = tuple(tuple(site.name for site in group) for group in groups)
    sites = tuple(group[0].name for group in groups)
    return Sensitivity(sites, ratios, kl, rank, error, resolved.name(), positions, names)


def _loss(
    model: nn.Module,
    group: Group,
    option: Option,
    resolved: Resolved,
    calibration: Calibration | None,
    dense: Reference,
) -> float:
    stats = statistics_of(group[0], calibration)
    root = model
    with ExitStack() as stack:
        for site, new in zip(group, resolved.factor(group, option, stats), strict=True):
            root = stack.enter_context(replaced(model, site, new.eval()))
        return dense.kl(root)


def _option(curve: Curve, ratio: float) -> Option | None:
    """The largest factored option that keeps at most this share of the dense parameters."""
    limit = ratio * curve.dense.cost.params
    fitting = [o for o in curve.options if not o.dense and o.cost.params <= limit]
    return fitting[-1] if fitting else None


def _positions(dense: Reference, number: int) -> int:
    mask = dense.mask(number)
    return dense.outputs(number)[..., 0].numel() if mask is None else int(mask.sum())
