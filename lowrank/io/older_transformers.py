"""What transformers did not do before 5.20 while it loaded a model that is declared as quantized.

It left every tensor that it renamed in the dtype of the file, and took tensors of any shape.
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


@torch.no_grad()
def complete_loading(
    model: nn.Module, wanted: dict[str, Wanted], kept: dict[str, torch.dtype], source: str
) -> None:
    """Cast what is of another dtype than wanted.

    Args:
        kept: parts of names whose dtype transformers decides.

    Raises:
        LowrankError: a parameter is of another shape than wanted.
    """
    loaded = {n: p for n, p in model.named_parameters() if n in wanted and not p.is_meta}
    wrong = [name for name, p in loaded.items() if p.shape != wanted[name].shape]
    if wrong:
        raise LowrankError(
            f"{source}: the weights do not fit config.json; of another shape: {listed(wrong)}"
        )
    for name, parameter in loaded.items():
        dtype = wanted[name].dtype
        decided = any(part in name for part in kept)
        if parameter.is_floating_point() and parameter.dtype != dtype and not decided:
            parameter.data = parameter.data.to(dtype)
