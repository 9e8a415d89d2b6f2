"""The registry of modules that hold fused weights as layers, and which modules become such."""

from __future__ import annotations

from torch import nn

from .split_attention import SplitAttention
from .split_conv import (
    SplitConv1d,
    SplitConv2d,
    SplitConv3d,
    SplitConvTranspose1d,
    SplitConvTranspose2d,
    SplitConvTranspose3d,
)
from .split_recurrent import SplitGRU, SplitLSTM, SplitRNN
from .unfused import Parameters, Unfused, unfuse

KINDS: tuple[type[Unfused], ...] = (
    SplitAttention, SplitLSTM, SplitGRU, SplitRNN,
    SplitConv1d, SplitConv2d, SplitConv3d,
    SplitConvTranspose1d, SplitConvTranspose2d, SplitConvTranspose3d,
)  # fmt: skip
SPLITS: dict[type[nn.Module], type[Unfused]] = {kind.WHOLE: kind for kind in KINDS}


def obstacle_to_split(module: nn.Module) -> str | None:
    """Why a module of a registered class stays whole; "" if it need not, None for any other."""
    kind = SPLITS.get(type(module))
    if kind is None:
        return None
    names = kind.cuts(module)
    held = [module._parameters.get(name) for name in names]
    if not module._parameters.keys() >= names.keys() or any(map(_is_odd, held)):
        return "its weight is not a plain parameter (weight norm, pruning or the like)"
    if "forward" in vars(module):
        return "its forward is wrapped (offloading or a patch): load the full model first"
    return kind.obstacle(module)


def split_module(module: nn.Module) -> Parameters:
    """Hold the weights of a module as layers, in place; returns the parameters that it held.

    Args:
        module: one for which `obstacle_to_split` is "".
    """
    return unfuse(module, SPLITS[type(module)])


def _is_odd(parameter: nn.Parameter | None) -> bool:
    plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
    return parameter is not None and not plain
