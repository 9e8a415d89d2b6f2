"""The closed-form refit of one layer, for inputs that are no longer the dense model's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import layouts, linalg
from ..nn import ChannelConv, LowRankLinear
from ..types import Size
from .tucker import fitted


def refitted_layer(
    module: nn.Module,
    size: Size,
    gram: Tensor,
    target: Tensor,
    *,
    root: Tensor | None = None,
    least: float = 0.0,
    seed: int = 0,
) -> Any:
    """The best layer of a size for the stream that it reads; see linalg/refit.py.

    Of two numbers, (r_out, r_in), it is a TuckerConv: the weight that the stream asks for,
    W K H'⁻¹, in Tucker form in the metric H'.

    Args:
        size: (rank,) or (r_out, r_in).
        gram, target: H' and K, (in, in).
        root: S (out, out), see `linalg.output_root`.
    """
    weight = layouts.matrix(module)
    if len(size) == 2:
        moved = linalg.regressed(weight, gram, target, least=least)
        inputs: int = module.in_channels  # type: ignore[assignment]
        whole = moved.view(len(moved), inputs, -1)
        return fitted(module, whole, (size[0], size[1]), gram, root=root)
    factors = linalg.refit(weight, size[0], gram, target, root=root, least=least, seed=seed)
    up, down = linalg.balance(*factors)
    if layouts.kind(module) == "conv":
        return ChannelConv.from_factors(module, down.to(weight), up.to(weight))
    return LowRankLinear.from_factors(down.to(weight), up.to(weight), layouts.bias(module))
