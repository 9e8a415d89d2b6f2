"""What older transformers do not do while they load a model that is declared as quantized.

Up to 5.20 every tensor that is renamed stays in the dtype of the file; up to 5.22 a tensor of any
shape is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..errors import LowrankError, listed


class Wanted(NamedTuple):
    """What a parameter has to be once it is loaded."""

    shape: torch.Size
    dtype: torch.dtype


def wanted_of(model: nn.Module) -> dict[str, Wanted]:
    """Of every parameter of a model on the meta device, as transformers is about to load it."""
    return {name: Wanted(p.shape, p.dtype) for name, p in model.named_parameters()}


def loaded_of(model: nn.Module, wanted: dict[str, Wanted]) -> dict[str, nn.Parameter]:
    """The parameters that are wanted, and not offloaded."""
    return {n: p for n, p in model.named_parameters() if n in wanted and not p.is_meta}


def check_shapes(model: nn.Module, wanted: dict[str, Wanted], source: str) -> None:
    """Check what was loaded.

    Raises:
        LowrankError: a parameter is of another shape than wanted.
    """
    wrong = [n for n, p in loaded_of(model, wanted).items() if p.shape != wanted[n].shape]
    if wrong:
        raise LowrankError(
            f"{source}: the weights do not fit config.json; of another shape: {listed(wrong)}"
        )


@torch.no_grad()
def cast_to(model: nn.Module, wanted: dict[str, Wanted], kept: dict[str, torch.dtype]) -> None:
    """Cast what is of another dtype than wanted.

    Args:
        kept: parts of names whose dtype transformers decides.
    """
    for name, parameter in loaded_of(model, wanted).items():
        dtype = wanted[name].dtype
        decided = any(part in name for part in kept)
        if parameter.is_floating_point() and parameter.dtype != dtype and not decided:
            parameter.data = parameter.data.to(dtype)
