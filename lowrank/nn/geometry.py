"""A convolution's geometry, which its factored forms keep and store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LowrankError
from .lowrank_linear import own

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ("zeros", "reflect", "replicate", "circular")
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Geometry of a 1-, 2- or 3-dimensional convolution; one number per dimension.

    Attributes:
        padding: on both sides of each dimension, or "same" or "valid".
    """

    in_channels: int
    out_channels: int
    kernel_size: Ints
    stride: Ints
    padding: Ints | str
    dilation: Ints
    groups: int
    padding_mode: str

    def __post_init__(self) -> None:
        dims = len(self.kernel_size)
        if dims not in CONVS:
            raise LowrankError(
                f"a convolution has 1 to 3 dimensions, got kernel {self.kernel_size}"
            )
        for name in ("stride", "padding", "dilation"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != dims:
                raise LowrankError(f"{name} must hold {dims} numbers, got {value}")
        if isinstance(self.padding, str) and self.padding not in ("same", "valid"):
            raise LowrankError(f"padding must be numbers, 'same' or 'valid', got {self.padding!r}")
        if self.padding_mode not in MODES:
            raise LowrankError(f"padding_mode must be one of {MODES}, got {self.padding_mode!r}")

    @classmethod
    def of(cls, conv: nn.Module) -> Self:
        """The geometry of an nn.Conv1d, 2d or 3d.

        Raises:
            LowrankError: any other layer, such as a transposed convolution.
        """
        if not isinstance(conv, tuple(CONVS.values())):
            raise LowrankError(f"expected nn.Conv1d, 2d or 3d, got {type(conv).__name__}")
        values = {field.name: getattr(conv, field.name) for field in fields(cls)}
        return cls(**values)

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """The inverse of `spec`; lists become tuples."""
        wide: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()}
        return cls(**wide)

    def spec(self) -> dict[str, Any]:
        """The fields as JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def kernel_numbers(self) -> int:
        """K: kernel taps in one channel."""
        return torch.Size(self.kernel_size).numel()

    @property
    def positions_read(self) -> int:
        """Input positions per output position: the product of the strides."""
        return torch.Size(self.stride).numel()

    def spread(self, inputs: int, outputs: int, bias: bool) -> Conv:
        """The same convolution with other channels: kernel, stride, padding, dilation are kept.

        Channels are counted over all groups, as in nn.Conv.
        """
        return self._conv(inputs, outputs, self.groups, bias)

    def pointwise(self, inputs: int, outputs: int, bias: bool) -> Conv:
        """A 1×1 convolution, which mixes the channels of each group."""
        return self.along((), inputs, outputs, bias=bias)

    def along(
        self, axes: Sequence[int], inputs: int, outputs: int, *, groups: int = 0, bias: bool = False
    ) -> Conv:
        """A convolution along these dimensions only, with their kernel, stride, padding, dilation.

        In sequence, those of all dimensions have the geometry of the whole.

        Args:
            groups: 0: those of the whole.
        """
        dims = range(len(self.kernel_size))
        pads = self.padding if axes else 0
        if isinstance(pads, tuple):  # "same" pads a kernel of size one by nothing
            pads = tuple(pads[d] if d in axes else 0 for d in dims)
        conv_type: Any = CONVS[len(dims)]
        conv: Conv = conv_type(
            inputs, outputs,
            tuple(self.kernel_size[d] if d in axes else 1 for d in dims),
            stride=tuple(self.stride[d] if d in axes else 1 for d in dims),
            padding=pads,
            dilation=tuple(self.dilation[d] if d in axes else 1 for d in dims),
            groups=groups or self.groups,
            padding_mode=self.padding_mode if axes else "zeros",
            bias=bias, device="meta",
        )  # fmt: skip
        return conv

    def dense(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The plain convolution of the weight (O, I/g · K), its bias not yet set."""
        whole = self._conv(self.in_channels, self.out_channels, self.groups, bias is not None)
        shape: Sequence[int] = (self.out_channels, -1, *self.kernel_size)
        whole.weight = nn.Parameter(weight.reshape(shape).contiguous())
        return whole

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x (B, I, *space) by a weight (O, I/g, *kernel)."""
        run: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        pads: Ints | str = self.padding
        if self.padding_mode != "zeros":
            x, pads = F.pad(x, self._around(), mode=self.padding_mode), (0,) * len(self.kernel_size)
        output: Tensor = run(x, weight, bias, self.stride, pads, self.dilation, self.groups)
        return output

    def _around(self) -> list[int]:
        """Numbers that are padded, before and after, from the last dimension on."""
        sizes = zip(self.kernel_size, self.dilation, strict=True)
        total = [(k - 1) * spread if self.padding == "same" else 0 for k, spread in sizes]
        before = [n // 2 for n in total]  # "same" pads the odd number after
        if isinstance(self.padding, tuple):
            before, total = list(self.padding), [2 * n for n in self.padding]
        both = zip(reversed(before), reversed(total), strict=True)
        return [n for first, every in both for n in (first, every - first)]

    def _conv(self, inputs: int, outputs: int, groups: int, bias: bool) -> Conv:
        conv_type: Any = CONVS[len(self.kernel_size)]
        conv: Conv = conv_type(
            inputs, outputs, self.kernel_size, stride=self.stride, padding=self.padding,
            dilation=self.dilation, groups=groups, padding_mode=self.padding_mode, bias=bias,
            device="meta",
        )  # fmt: skip
        return conv

    def label(self, module: nn.Module) -> None:
        """Set the attributes of nn.Conv on a module that replaces it."""
        for field in fields(self):
            setattr(module, field.name, getattr(self, field.name))

    @property
    def weight_shape(self) -> Ints:
        """(O, I/g, *kernel)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)


def per_group(numbers: int, groups: int, what: str) -> int:
    """Channels per group.

    Raises:
        LowrankError: `numbers` is not a positive multiple of `groups`; `what` is named.
    """
    if numbers < 1 or numbers % groups:
        raise LowrankError(
            f"{what} must be a positive multiple of the {groups} groups, got {numbers}"
        )
    return numbers // groups


def fill(child: Conv, tensor: Tensor, like: Tensor, what: str) -> None:
    """Set a child's weight to a contiguous copy, with the dtype and device of `like`.

    Args:
        tensor: in the order of the weight, trailing axes merged or left out.

    Raises:
        LowrankError: another shape; `what` is named.
    """
    shape, got = child.weight.shape, tensor.shape
    if got[:1] != shape[:1] or tensor.numel() != shape.numel() or (got[2:] and got[1] != shape[1]):
        raise LowrankError(
            f"{what} must have shape {tuple(shape)}, trailing axes merged or not, got {tuple(got)}"
        )
    child.weight = own(tensor.to(like).reshape(shape))


def fill_bias(child: Conv, bias: Tensor | None) -> None:
    """Set the last child's bias to a copy of the original one."""
    if bias is not None:
        child.bias = own(bias)
