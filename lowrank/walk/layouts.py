"""The weight of a layer as a matrix, and why some layers cannot be factored.

A layer of a subclass is accepted only if it computes what its base does, which is tried out; a
parametrised or hooked layer computes its weight elsewhere. Hooks of accelerate that only move the
inputs to the layer's device are none.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import parametrize

from ..nn.splits import obstacle_to_split
from ..nn.unfused import Unfused
from ..types import Cost
from .probing import difference

TABLES = (nn.Embedding, nn.EmbeddingBag)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HOOKS = "accelerate.hooks"  # never imported here: where a layer has such a hook, it is there
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def kind(module: nn.Module) -> str | None:
    """ "linear" for nn.Linear and transformers' Conv1D, "embedding" for nn.Embedding and
    nn.EmbeddingBag, "conv" for convolutions, subclasses included; None otherwise, and for what is
    split into such layers."""
    if isinstance(module, Unfused):
        return None
    if isinstance(module, TABLES):
        return "embedding"
    if isinstance(module, (*CONVS, *TRANSPOSED)):
        return "conv"
    return "linear" if isinstance(module, nn.Linear) or layout(module) == "conv1d" else None


def layout(module: nn.Module) -> str:
    """ "conv1d" for transformers' Conv1D, which stores (in, out); "linear" otherwise."""
    return "conv1d" if any(map(_is_conv1d, type(module).__mro__)) else "linear"


def matrix(module: nn.Module) -> Tensor:
    """The weight as (out, in), for an embedding (V, D), for a convolution (O, I/g · K): the live
    tensor or a view of it (a copy, where it is not contiguous)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if weight.ndim > 2 and isinstance(module, CONVS):
        return weight.flatten(1)
    return weight.T if layout(module) == "conv1d" else weight


def bias(module: nn.Module) -> Tensor | None:
    """The bias (out,), or None."""
    return getattr(module, "bias", None)


def reading(module: nn.Module) -> tuple[object, ...]:
    """What, besides the tensor, determines the rows a layer reads: a convolution's geometry."""
    if not isinstance(module, CONVS):
        return ()
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return tuple(getattr(module, name) for name in names)


def dense_cost(*modules: nn.Module) -> Cost:
    """Cost of one weight held by all these modules: embeddings look up, linear layers multiply."""
    weight = matrix(modules[0])
    size = weight.numel()
    products = head_count(modules) * size if kind(modules[0]) == "embedding" else size
    return Cost(size, size * weight.dtype.itemsize, products)


def head_count(modules: Sequence[nn.Module]) -> int:
    """Number of output heads among the modules that hold a table; 0 if the first is no table."""
    return sum(kind(m) != "embedding" for m in modules) if kind(modules[0]) == "embedding" else 0


def obstacle(module: nn.Module) -> str:
    """Why a layer of a known kind cannot be replaced; "" if it can."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized: remove the parametrization first"
    if "weight" not in module._parameters:
        return "its weight is not a plain parameter (weight norm, pruning or the like)"
    if isinstance(module, TRANSPOSED):
        return obstacle_to_split(module) or "transposed convolutions are not supported here"
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if any((*hooks, module._backward_hooks, module._backward_pre_hooks)):
        return "it has hooks that a new layer would lose"
    if is_patched(module):
        return "its forward is wrapped (offloading or a patch): load the full model first"
    if type(module.weight) is not nn.Parameter:
        return f"its weight is of class {type(module.weight).__name__}, not a plain tensor"
    if kind(module) == "embedding" and module.max_norm is not None:
        return f"max_norm={module.max_norm} rescales rows when read, which factors cannot"
    if getattr(module, "groups", 1) != 1:
        return obstacle_to_split(module) or "grouped convolutions are not supported here"
    weight = matrix(module)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"its weight is stored as {weight.dtype}"
    if weight.ndim != 2 or 0 in weight.shape:
        return f"its weight has shape {tuple(weight.shape)}"
    base = _base(module)
    return "" if type(module) is base else difference(module, base)


def is_patched(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class's forward pass and, perhaps, a hook that
    places it on a device."""
    forward = vars(module).get("forward")
    if forward is None and not hasattr(module, "_hf_hook"):
        return False
    if hasattr(module, "_hf_hook"):
        ours = isinstance(forward, functools.partial) and forward.func.__module__ == HOOKS
        if not ours or not _places(module._hf_hook):
            return True
        forward = vars(module).get("_old_forward")
    # What accelerate leaves when its hook is removed: the method, held by the module itself.
    own = isinstance(forward, MethodType) and forward.__func__ is type(module).forward
    return not own


def _places(hook: Any) -> bool:
    """Whether a hook of accelerate moves inputs to a device and does nothing else."""
    known = sys.modules[HOOKS]
    if type(hook) is known.SequentialHook:
        return all(map(_places, hook.hooks))
    return type(hook) is known.AlignDevicesHook and not hook.offload


def is_finite(module: nn.Module) -> bool:
    """Whether all numbers of a layer's own parameters are finite."""
    return all(map(sound, module.parameters(recurse=False)))


def sound(tensor: Tensor) -> bool:
    """Whether all numbers are finite. A sum shows it in one pass; it is in doubt if it is not.

    Tensors of other classes (quantized, sharded) need not be able to say.
    """
    plain = tensor.detach()
    if type(plain) is not Tensor or plain.is_meta:
        return True
    if not plain.is_floating_point() or plain.dtype.itemsize < 2:
        return True
    wide = torch.float64 if plain.dtype == torch.float64 else torch.float32
    return bool(plain.sum(dtype=wide).isfinite()) or bool(plain.isfinite().all())


def keeps_moments(module: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics."""
    return isinstance(module, NORMS) and module.running_mean is not None


def _base(module: nn.Module) -> type[nn.Module]:
    """The class of torch, or transformers' Conv1D, that a layer is or is derived from."""
    known = (nn.Linear, *TABLES, *CONVS)
    return next(c for c in type(module).__mro__ if c in known or _is_conv1d(c))


def _is_conv1d(cls: type) -> bool:
    # By name, since the library never imports transformers on its own.
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


ENTRIES = 2**22  # entries of the patches unfolded at a time


def chunks(module: nn.Module, tensor: Tensor) -> Iterator[Tensor]:
    """The input vectors (rows, in) of a layer in chunks, so that patches take bounded memory."""
    if kind(module) != "conv":
        yield tensor.reshape(-1, tensor.shape[-1])
        return
    samples = _batched(module, tensor)
    if not len(samples):
        return
    kernel, channels = _kernel(module), samples.shape[1]
    positions = math.prod(samples.shape[2:])  # of the input, an upper bound
    step = max(ENTRIES // max(channels * math.prod(kernel) * positions, 1), 1)
    for part in samples.split(step):
        yield _unfolded(module, part)


def fits(module: nn.Module, tensor: Tensor) -> bool:
    """Whether the layer can read this tensor, by its number of features or channels."""
    wide = matrix(module).shape[-1]
    if kind(module) != "conv":
        return tensor.shape[-1:] == (wide,)
    spatial = len(_kernel(module))
    axis = -1 - spatial
    return tensor.ndim in (spatial + 1, spatial + 2) and tensor.shape[axis] == module.in_channels


def multiplies(module: nn.Module, tensor: Tensor) -> bool:
    """Whether the layer can multiply this dtype by its weight: torch's own layers do not cast."""
    if type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return True
    if tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type):
        return True
    return tensor.dtype == matrix(module).dtype


def output_rows(module: nn.Module, output: Tensor) -> Tensor:
    """The output vectors (rows, out), in the order of the input rows."""
    if kind(module) != "conv":
        return output.reshape(-1, output.shape[-1])
    samples = _batched(module, output)
    return samples.movedim(1, -1).reshape(-1, samples.shape[1])


def _unfolded(module: nn.Module, samples: Tensor) -> Tensor:
    """(samples, I, *space) -> (samples · positions, I · K)."""
    kernel = _kernel(module)
    mode = module.padding_mode
    # torch keeps it for all kinds of padding, "same" included.
    around: list[int] = list(module._reversed_padding_repeated_twice)  # type: ignore[arg-type]
    if any(around):
        samples = pad(samples, around, mode="constant" if mode == "zeros" else str(mode))
    strides, dilations = tuple(module.stride), tuple(module.dilation)  # type: ignore[arg-type]
    for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        samples = samples.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    dims, last = len(kernel), samples.ndim
    order = (0, *range(2, 2 + dims), 1, *range(last - dims, last))
    return samples.permute(order).reshape(-1, samples.shape[1] * math.prod(kernel))


def _batched(module: nn.Module, tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == len(_kernel(module)) + 2 else tensor[None]


def _kernel(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.kernel_size)  # type: ignore[arg-type]
