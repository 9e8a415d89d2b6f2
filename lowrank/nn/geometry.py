"""A convolution's geometry: what its factored forms keep, and how it is written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import LowrankError

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ("zeros", "reflect", "replicate", "circular")
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Of a 1-, 2- or 3-dimensional convolution; one number a dimension.

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
        """Read from an nn.Conv1d, 2d or 3d."""
        values = {field.name: getattr(conv, field.name) for field in fields(cls)}
        return cls(**values)

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """What `spec` wrote; lists become tuples."""
        wide: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()}
        return cls(**wide)

    def spec(self) -> dict[str, Any]:
        """As JSON."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @property
    def kernel_numbers(self) -> int:
        """K: numbers under the kernel in one channel."""
        return torch.Size(self.kernel_size).numel()

    @property
    def positions_read(self) -> int:
        """Input positions for every output position, as strides have it."""
        return torch.Size(self.stride).numel()

    def spread(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """The convolution itself with other channels: kernel, stride, padding, dilation as here."""
        return self._conv(inputs, outputs, 1, bias)

    def pointwise(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A convolution with a kernel of one number: channels are mixed, positions are not."""
        made: Any = CONVS[len(self.kernel_size)]
        return made(inputs, outputs, 1, bias=bias, device="meta")

    def dense(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The plain convolution of the weight (O, I/g · K), its bias still to be filled in."""
        whole = self._conv(self.in_channels, self.out_channels, self.groups, bias is not None)
        shape: Sequence[int] = (self.out_channels, -1, *self.kernel_size)
        whole.weight = nn.Parameter(weight.reshape(shape).contiguous())
        return whole

    def _conv(self, inputs: int, outputs: int, groups: int, bias: bool) -> nn.Module:
        made: Any = CONVS[len(self.kernel_size)]
        return made(
            inputs, outputs, self.kernel_size, stride=self.stride, padding=self.padding,
            dilation=self.dilation, groups=groups, padding_mode=self.padding_mode, bias=bias,
            device="meta",
        )  # fmt: skip
