"""What a layer multiplies its matrix by: the rows of its input, and of its output.

A linear layer reads vectors (..., in). A convolution reads patches: at every output position the
I/g · K numbers under the kernel, in the order of its weight's (I/g, *kernel).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import pad

from . import layouts

ENTRIES = 2**22  # numbers of patches that are unfolded at a time


def chunks(module: nn.Module, tensor: Tensor) -> Iterator[Tensor]:
    """The input vectors (rows, in) of a layer, some at a time: all samples are never unfolded."""
    if layouts.kind(module) != "conv":
        yield tensor.reshape(-1, tensor.shape[-1])
        return
    samples = _batched(module, tensor)
    if not len(samples):
        return
    kernel, channels = _kernel(module), samples.shape[1]
    positions = math.prod(samples.shape[2:])  # of the input: strides make it fewer
    step = max(ENTRIES // max(channels * math.prod(kernel) * positions, 1), 1)
    for part in samples.split(step):
        yield _unfolded(module, part)


def fits(module: nn.Module, tensor: Tensor) -> bool:
    """Whether the layer can read this tensor: the number of features, or of channels."""
    wide = layouts.matrix(module).shape[-1]
    if layouts.kind(module) != "conv":
        return tensor.shape[-1:] == (wide,)
    spatial = len(_kernel(module))
    axis = -1 - spatial
    return tensor.ndim in (spatial + 1, spatial + 2) and tensor.shape[axis] == module.in_channels


def output_rows(module: nn.Module, output: Tensor) -> Tensor:
    """The output vectors (rows, out), in the order of the input's rows."""
    if layouts.kind(module) != "conv":
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
