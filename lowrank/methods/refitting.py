"""The closed-form refit of one layer, for inputs that are no longer the dense model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..nn import ChannelConv, LowRankLinear
from ..types import Method, Option, Size, Statistics
from ..walk import layouts
from .conv_forms import FORMS, Metric, fitted


def refitted_layer(
    module: nn.Module,
    size: Size,
    storage: str,
    gram: Tensor,
    target: Tensor,
    *,
    root: Tensor | None = None,
    least: float = 0.0,
    seed: int = 0,
) -> Any:
    """The best layer of a size for the stream that it reads; see linalg/refit.py.

    In a form of convolutions other than fewer channels it is the weight that the stream asks for,
    W K H'⁻¹, in this form in the metric H'.

    Args:
        size, storage: of the option that was chosen.
        gram, target: H' and K, (in, in).
        root: S (out, out), see `linalg.output_root`.
    """
    weight = layouts.matrix(module)
    if storage in FORMS:
        moved = linalg.regressed(weight, gram, target, least=least)
        shape: torch.Size = module.weight.shape  # type: ignore[assignment]
        return fitted(module, moved.view(shape), size, storage, Metric(gram, root))
    factors = linalg.refit_factors(weight, size[0], gram, target, root=root, least=least, seed=seed)
    up, down = linalg.balance(*factors)
    if layouts.kind(module) == "conv":
        return ChannelConv.from_factors(module, down.to(weight), up.to(weight))
    return LowRankLinear.from_factors(down.to(weight), up.to(weight), layouts.bias(module))


def refitted_form(
    way: Method,
    module: nn.Module,
    option: Option,
    gram: Tensor,
    target: Tensor,
    *,
    least: float = 0.0,
) -> Any:
    """A linear layer in a form of its own for the stream that it reads.

    It is what the method makes of the weight that the stream asks for, W K H'⁻¹, in the metric H'.

    Args:
        gram, target: H' and K, (in, in).
    """
    weight, bias = layouts.matrix(module), layouts.bias(module)
    moved = linalg.regressed(weight, gram, target, least=least).to(weight.device)
    wanted = nn.Linear(moved.shape[1], len(moved), bias=bias is not None, device="meta")
    wanted.weight = nn.Parameter(moved, requires_grad=False)
    if bias is not None:
        wanted.bias = nn.Parameter(bias.detach().to(moved), requires_grad=False)
    return way.factor(wanted, option, Statistics(count=1, gram=gram)).to(weight.dtype)
