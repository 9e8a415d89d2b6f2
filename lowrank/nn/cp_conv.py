"""A convolution as 1×1, one depthwise convolution along each dimension, and 1×1: the CP form.

W[o, i, a, b] = Σ_r last[o, r] · height[r, a] · width[r, b] · first[r, i] (Lebedev et al., arXiv
1412.6553). In a grouped convolution every group has its own R components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..types import Cost
from .factored_conv import ConvSequence
from .geometry import Geometry, fill, fill_bias, per_group


class CPConv(ConvSequence):
    """nn.Conv children, y = last(spatial(first(x))), with g groups.

    Tensors: `first.weight` (g·R, I/g, 1…), `spatial.0.weight` (g·R, 1, kh, 1…), one per dimension,
    `last.weight` (O, R, 1…), `last.bias` (O,). Each depthwise convolution has the stride, padding
    and dilation of its dimension. The module has the attributes of an nn.Conv; its `rank` R is per
    group.
    """

    STORAGE = "cp"
    OUT = "last"

    def __init__(self, geometry: Geometry, rank: int, *, bias: bool) -> None:
        """Built on the meta device; see `from_factors`."""
        super().__init__()
        self.geometry, self.rank = geometry, rank
        geometry.label(self)
        inner = geometry.groups * rank
        self.first = geometry.pointwise(geometry.in_channels, inner, bias=False)
        along = [
            geometry.along((axis,), inner, inner, groups=inner)
            for axis in range(len(geometry.kernel_size))
        ]
        self.spatial = nn.Sequential(*along)
        self.last = geometry.pointwise(inner, geometry.out_channels, bias=bias)

    @classmethod
    def from_factors(
        cls, conv: nn.Module, last: Tensor, spatial: Sequence[Tensor], first: Tensor
    ) -> Self:
        """The factored form of `conv`, in its dtype and on its device; the bias is copied.

        Args:
            conv: nn.Conv1d, 2d or 3d.
            last: (O, R).
            spatial: (g·R, k) for each dimension.
            first: (g·R, I/g).

        Raises:
            LowrankError: the factors do not fit the convolution.
        """
        geometry, bias, weight = Geometry.of(conv), conv.bias, conv.weight
        rank = per_group(first.shape[0], geometry.groups, "rows of `first`")
        layer = cls(geometry, rank, bias=bias is not None)
        if len(spatial) != len(layer.spatial):
            raise LowrankError(
                f"expected one factor for each dimension of kernel {geometry.kernel_size}, "
                f"got {len(spatial)}"
            )
        fill(layer.first, first, weight, "`first`")  # type: ignore[arg-type]
        for axis, factor in enumerate(spatial):
            child: Any = layer.spatial[axis]
            fill(child, factor, weight, f"`spatial.{axis}`")  # type: ignore[arg-type]
        fill(layer.last, last, weight, "`last`")  # type: ignore[arg-type]
        fill_bias(layer.last, bias)  # type: ignore[arg-type]
        return layer

    @classmethod
    def empty(cls, *, rank: int, bias: bool, **geometry: Any) -> Self:
        return cls(Geometry.from_spec(geometry), rank, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """input (B, I, *space) -> (B, O, *space')."""
        output: Tensor = self.last(self.spatial(self.first(input)))
        return output

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (O, I/g · K), computed in `dtype` (None: that of the factors)."""
        dtype = dtype or self.last.weight.dtype
        groups = self.geometry.groups
        first = self.first.weight.to(dtype).flatten(1)  # (g·R, I/g)
        taps = first.new_ones(len(first), 1)
        for child in self.spatial:
            factor: Tensor = child.weight.to(dtype).flatten(1)  # type: ignore[operator]
            taps = torch.einsum("ra,rb->rab", taps, factor).flatten(1)
        inner = torch.einsum("ri,rk->rik", first, taps).flatten(1).unflatten(0, (groups, -1))
        last = self.last.weight.to(dtype).flatten(1).unflatten(0, (groups, -1))  # (g, O/g, R)
        return (last @ inner).flatten(0, 1)

    def spec(self) -> dict[str, Any]:
        return {**self.geometry.spec(), "rank": self.rank, "bias": self.bias is not None}

    def cost(self) -> Cost:
        return cp_cost(self.geometry, self.rank, itemsize=self.last.weight.dtype.itemsize)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def cp_cost(geometry: Geometry, rank: int, *, itemsize: int) -> Cost:
    """MACs are per output position. A child runs before the strides of those after it, at s times
    as many positions for every later stride s; `first` at every input position.

    Args:
        rank: per group.
        itemsize: bytes of one number.
    """
    first, last = rank * geometry.in_channels, rank * geometry.out_channels
    depthwise = [rank * geometry.groups * taps for taps in geometry.kernel_size]
    params = first + sum(depthwise) + last
    macs = first * geometry.positions_read + last
    for axis, numbers in enumerate(depthwise):
        macs += numbers * math.prod(geometry.stride[axis + 1 :])
    return Cost(params, params * itemsize, macs)
