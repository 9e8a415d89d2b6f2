"""A 2-dimensional convolution as two, one along each dimension: k×1 to r channels, then 1×k.

The kernel is separable: the weight (O, I, kh, kw), rearranged to (O · kw, I · kh), has rank r
(Jaderberg et al., arXiv 1405.3866; Tai et al., arXiv 1511.06067). In a grouped convolution every
group has its own r channels.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..types import Cost
from .factored_conv import ConvSequence
from .geometry import Geometry, fill, fill_bias, per_group


class SpatialConv(ConvSequence):
    """Two nn.Conv2d children, y = up(down(x)), with g groups.

    Tensors: `down.weight` (g·r, I/g, kh, 1), `up.weight` (O, r, 1, kw), `up.bias` (O,). Each child
    has the stride, padding and dilation of its dimension. The module has the attributes of an
    nn.Conv2d; its `rank` r is per group, at most min(O/g · kw, I/g · kh).
    """

    STORAGE = "spatial"
    REFITTED = True
    OUT = "up"

    def __init__(self, geometry: Geometry, rank: int, *, bias: bool) -> None:
        """Built on the meta device; see `from_factors`.

        Raises:
            LowrankError: the convolution is not 2-dimensional.
        """
        super().__init__()
        if len(geometry.kernel_size) != 2:
            raise LowrankError(
                "only a 2-dimensional convolution splits into rows and columns, got kernel "
                f"{geometry.kernel_size}: use ChannelConv, TuckerConv or CPConv"
            )
        self.geometry, self.rank = geometry, rank
        geometry.label(self)
        inner = geometry.groups * rank
        self.down = geometry.along((0,), geometry.in_channels, inner)
        self.up = geometry.along((1,), inner, geometry.out_channels, bias=bias)

    @classmethod
    def from_factors(cls, conv: nn.Module, down: Tensor, up: Tensor) -> Self:
        """The factored form of `conv`, in its dtype and on its device; the bias is copied.

        Args:
            conv: nn.Conv2d.
            down: (g·r, I/g, kh).
            up: (O, r, kw).

        Raises:
            LowrankError: the factors do not fit the convolution.
        """
        geometry, bias, weight = Geometry.of(conv), conv.bias, conv.weight
        rank = per_group(down.shape[0], geometry.groups, "rows of `down`")
        layer = cls(geometry, rank, bias=bias is not None)
        fill(layer.down, down, weight, "`down`")  # type: ignore[arg-type]
        fill(layer.up, up, weight, "`up`")  # type: ignore[arg-type]
        fill_bias(layer.up, bias)  # type: ignore[arg-type]
        return layer

    @classmethod
    def empty(cls, *, rank: int, bias: bool, **geometry: Any) -> Self:
        return cls(Geometry.from_spec(geometry), rank, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """input (B, I, height, width) -> (B, O, height', width')."""
        output: Tensor = self.up(self.down(input))
        return output

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (O, I/g · kh · kw), computed in `dtype` (None: that of the factors)."""
        dtype = dtype or self.up.weight.dtype
        groups = self.geometry.groups
        up = self.up.weight.to(dtype).flatten(2).unflatten(0, (groups, -1))  # (g, O/g, r, kw)
        down = self.down.weight.to(dtype).flatten(2).unflatten(0, (groups, -1))  # (g, r, I/g, kh)
        dense: Tensor = torch.einsum("gorb,gria->goiab", up, down)
        return dense.reshape(self.geometry.out_channels, -1)

    def spec(self) -> dict[str, Any]:
        return {**self.geometry.spec(), "rank": self.rank, "bias": self.bias is not None}

    def cost(self) -> Cost:
        return spatial_cost(self.geometry, self.rank, itemsize=self.up.weight.dtype.itemsize)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def spatial_cost(geometry: Geometry, rank: int, *, itemsize: int) -> Cost:
    """MACs are per output position. `down` runs before the stride of `up`: at s times as many
    positions, s the stride along the width.

    Args:
        rank: per group.
        itemsize: bytes of one number.
    """
    (height, width), (_, stride) = geometry.kernel_size, geometry.stride
    down, up = rank * geometry.in_channels * height, rank * geometry.out_channels * width
    return Cost(down + up, (down + up) * itemsize, down * stride + up)
