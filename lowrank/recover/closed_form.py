"""The refit of one layer, in closed form, from the moments of its inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..methods.resolved import Resolved
from ..plans.entry import Entry
from ..types import Site, Statistics
from ..walk import layouts
from .streams import Moments

NOISE = 1e-6  # rounding error of fp32 sums, relative to the mean square


def refit_layer(
    resolved: Resolved,
    site: Site,
    entry: Entry,
    known: Statistics,
    moments: Moments,
    share: float,
    *,
    sums: bool = True,
    seed: int = 0,
) -> nn.Module:
    """The factored layer whose output is nearest to what the dense one gives in the dense model.

    A bias fits the mean of the outputs; the factors fit the deviations from it.

    Args:
        known: statistics of the dense model, for the metric of the outputs.
        moments: of the layer's inputs in the dense model and in the compressed one.
        share: of the errors made before this layer, what it is to make good.
        sums: whether it also makes good what the sum that it adds to lacks.
    """
    bias = layouts.bias(site.module)
    moments = moments.shrunk(known)
    if not sums:
        moments = replace(moments, error=None, mean_error=None)
    least = NOISE * float(moments.gram.diagonal().mean())
    centred = moments if bias is None else _centred(moments)
    new = resolved.refitted(
        site,
        entry.option(),
        known,
        gram=centred.gram,
        cross=centred.cross,
        extra=centred.error,
        share=share,
        least=least,
        seed=seed,
    )
    if bias is not None:
        with torch.no_grad():
            new.bias.copy_(_bias_of(new, site.module, bias, moments, share))
    return cast(nn.Module, new)


def _centred(moments: Moments) -> Moments:
    """Second moments about the means, in place of about 0."""
    mean, error = moments.mean, moments.error
    if error is not None and moments.mean_error is not None:
        error = error - torch.outer(moments.mean_error, mean)
    return replace(
        moments,
        gram=moments.gram - torch.outer(mean, mean),
        cross=moments.cross - torch.outer(moments.dense_mean, mean),
        error=error,
    )


def _bias_of(new: Any, dense: nn.Module, bias: Tensor, moments: Moments, share: float) -> Tensor:
    """The bias that gives the mean output, in float64."""
    weight = layouts.matrix(dense)
    mean = (1 - share) * moments.mean + share * moments.dense_mean
    wanted = weight.detach().double() @ mean.to(weight.device)
    if moments.mean_error is not None:
        wanted += share * moments.mean_error.to(wanted.device)
    found = new.dense_weight(torch.float64)
    return bias.double() + wanted - found @ moments.mean.to(found.device)
