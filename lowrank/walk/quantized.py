"""Whether a model that is marked as quantized is: asked of its weights, not of the mark.

A model that was dequantised while it was loaded keeps the mark: transformers leaves "gguf" on one
whose weights are plain floating-point numbers. A mark that no quantizer acted on is believed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import Form
from . import layouts

CODES = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32})
PARTS = frozenset({"weight", "bias"})
# Where layers of an architecture come from; those that compute with codes come from elsewhere.
PLAIN = ("torch.nn.modules.", "transformers.models.", "transformers.pytorch_utils")


def is_dequantised(model: nn.Module) -> bool:
    """Whether one of transformers' quantizers loaded a model and left plain numbers in it."""
    return any(map(_was_loaded, model.modules())) and is_dense(model)


def _was_loaded(module: nn.Module) -> bool:
    """Whether a quantizer is noted at a module, or at the config that it shares with the whole."""
    noted = getattr(getattr(module, "config", None), "_is_quantized", False)
    return bool(noted) or getattr(module, "hf_quantizer", None) is not None


def is_dense(model: nn.Module) -> bool:
    """Whether all weights are plain numbers that plain layers compute with."""
    return not any(map(_is_coded, model.modules()))


def _is_coded(module: nn.Module) -> bool:
    held = {**module._parameters, **({} if isinstance(module, Form) else module._buffers)}
    tensors = {key: tensor for key, tensor in held.items() if tensor is not None}
    if any(_holds_codes(tensor) for tensor in tensors.values()):
        return True
    if layouts.kind(module) is None:
        return False
    own = type(module).__module__.startswith("torch.nn.modules.")
    if layouts.is_patched(module) or (own and not tensors.keys() <= PARTS):
        return True
    return not type(module).__module__.startswith(PLAIN) and bool(layouts.obstacle(module))


def _holds_codes(tensor: Tensor) -> bool:
    """Whether a tensor cannot be the numbers that a layer computes with."""
    if isinstance(tensor, nn.Parameter):
        plain = type(tensor) is nn.Parameter and tensor.is_floating_point()
        return not plain or tensor.dtype.itemsize < 2
    small = tensor.is_floating_point() and tensor.dtype.itemsize < 2
    return type(tensor) is not Tensor or small or (tensor.dtype in CODES and tensor.ndim > 1)
