"""Linear layers as sites, with the statistics of inputs that NumPy can be asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from lowrank.types import Curve, Option, Site, Statistics
from lowrank.walk import layouts


def linear(out_features: int, in_features: int, seed: int = 0, *, bias: bool = True) -> nn.Linear:
    """float64, with singular values that fall."""
    rng = torch.Generator().manual_seed(seed)
    layer = nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
        layer.weight *= torch.linspace(0.1, 3, in_features)
    return layer


def site(layer: nn.Module, name: str = "fc") -> Site:
    shape = tuple(layouts.matrix(layer).shape)
    return Site(name, (name,), "linear", (layer,), shape, layouts.dense_cost(layer))


def inputs(width: int, tokens: int = 300, seed: int = 0) -> torch.Tensor:
    """Correlated rows (tokens, width) with a mean."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, width, generator=rng, dtype=torch.float64)
    mix = torch.randn(width, width, generator=rng, dtype=torch.float64)
    return rows @ (mix * torch.logspace(0, -2, width)) + 0.1


def statistics(rows: torch.Tensor) -> Statistics:
    return Statistics(len(rows), rows.T @ rows / len(rows), rows.mean(0))


def two_sides(shape: tuple[int, int], seed: int = 0, scale: float = 1.0) -> Statistics:
    gradients = inputs(shape[0], tokens=90, seed=seed + 7) * scale
    stats = statistics(inputs(shape[1], seed=seed))
    return replace(stats, out_gram=gradients.T @ gradients / len(gradients))


def output_error(layer: nn.Module, new: nn.Module, rows: torch.Tensor) -> float:
    """E‖layer(x) − new(x)‖² over the rows, measured by running both."""
    with torch.no_grad():
        return float((layer(rows) - new(rows)).square().sum(1).mean())


def weight_error(layer: nn.Linear, new: nn.Module) -> float:
    difference = layer.weight.detach().numpy() - new.dense_weight().detach().numpy()
    return float(np.square(difference).sum())


def at_rank(curve: Curve, rank: int) -> Option:
    return next(option for option in curve.options if option.size == (rank,))


def ranks(options: Sequence[Option]) -> list[int]:
    return [option.size[0] for option in options if option.size is not None]
