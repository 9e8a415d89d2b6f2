"""A convolution through fewer channels: the kernel to r channels, then a 1×1 convolution.

The weight as a matrix W (O, I · K) has rank r: `down` has r filters, `up` mixes their outputs
(Denton et al., arXiv 1404.0736; Zhang et al., arXiv 1505.06798). The mirrored form mixes first and
has the kernel last: then W as (O · K, I) has rank r. A 1×1 convolution is a linear layer, and so
are both of its factors. In a grouped convolution every group has its own r channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from ..errors import unknown
from ..types import Cost, Size
from .factored_conv import ConvSequence
from .geometry import Geometry, fill, fill_bias, per_group
from .lowrank_linear import low_rank_cost, own

Wide = Literal["first", "last"]


class ChannelConv(ConvSequence):
    """Two nn.Conv children, y = up(down(x)), with g groups.

    Tensors for `wide="first"`: `down.weight` (g·r, I/g, *kernel), `up.weight` (O, r, 1…); for
    `"last"`: `down.weight` (g·r, I/g, 1…), `up.weight` (O, r, *kernel). `up.bias` (O,). The child
    with the kernel has the original stride, padding and dilation. The module has the attributes of
    an nn.Conv; its `rank` r is per group.
    """

    STORAGE = "factors"
    WORDS = frozenset({"padding_mode", "wide"})
    REFITTED = True
    NESTED = True
    OUT = "up"

    def __init__(self, geometry: Geometry, rank: int, *, bias: bool, wide: Wide = "first") -> None:
        """Built on the meta device; see `from_factors`.

        Raises:
            LowrankError: `wide` is neither "first" nor "last".
        """
        super().__init__()
        if wide not in get_args(Wide):
            raise unknown("position of the kernel, wide =", str(wide), get_args(Wide))
        self.geometry, self.rank, self.wide = geometry, rank, wide
        geometry.label(self)
        inner = geometry.groups * rank
        one, two = geometry.spread, geometry.pointwise
        if wide == "last":
            one, two = two, one
        self.down = one(geometry.in_channels, inner, bias=False)
        self.up = two(inner, geometry.out_channels, bias=bias)

    @classmethod
    def from_factors(
        cls, conv: nn.Module, down: Tensor, up: Tensor, *, wide: Wide = "first"
    ) -> Self:
        """The factored form of `conv`, in its dtype and on its device; the bias is copied.

        Args:
            conv: nn.Conv1d, 2d or 3d.
            down: (g·r, I/g · K); (g·r, I/g) with the kernel last.
            up: (O, r); (O, r · K) with the kernel last.

        Raises:
            LowrankError: the factors do not fit the convolution.
        """
        geometry, bias, weight = Geometry.of(conv), conv.bias, conv.weight
        rank = per_group(down.shape[0], geometry.groups, "rows of `down`")
        layer = cls(geometry, rank, bias=bias is not None, wide=wide)
        fill(layer.down, down, weight, "`down`")  # type: ignore[arg-type]
        fill(layer.up, up, weight, "`up`")  # type: ignore[arg-type]
        fill_bias(layer.up, bias)  # type: ignore[arg-type]
        return layer

    @classmethod
    def empty(cls, *, rank: int, bias: bool, wide: Wide = "first", **geometry: Any) -> Self:
        return cls(Geometry.from_spec(geometry), rank, bias=bias, wide=wide)

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        """Cost with the kernel first, as of the factored matrix (O, I · K)."""
        return low_rank_cost(*shape, *size, itemsize=itemsize)

    def forward(self, input: Tensor) -> Tensor:
        """input (B, I, *space) -> (B, O, *space')."""
        output: Tensor = self.up(self.down(input))
        return output

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (O, I/g · K), computed in `dtype` (None: that of the factors)."""
        dtype = dtype or self.up.weight.dtype
        groups, up = self.geometry.groups, self.up.weight.to(dtype).flatten(2)
        up = up.unflatten(0, (groups, -1))  # (g, O/g, r, K or 1)
        down = self.down.weight.to(dtype).flatten(2).unflatten(0, (groups, -1))
        # One of the two is 1×1.
        dense: Tensor = torch.einsum("gork,gril->goikl", up, down)
        return dense.reshape(self.geometry.out_channels, -1)

    def leading(self, rank: int, owner: nn.Module | None = None) -> Self:
        bias = self.up.bias
        layer = type(self)(self.geometry, rank, bias=bias is not None, wide=self.wide)
        down = self.down.weight.unflatten(0, (self.geometry.groups, -1))[:, :rank].flatten(0, 1)
        layer.down.weight, layer.up.weight = own(down), own(self.up.weight[:, :rank])
        layer.up.bias = bias
        return layer

    def spec(self) -> dict[str, Any]:
        """JSON; `wide` is present only if "last"."""
        sizes: dict[str, Any] = {"rank": self.rank, "bias": self.bias is not None}
        placed = {} if self.wide == "first" else {"wide": self.wide}
        return {**self.geometry.spec(), **sizes, **placed}

    def cost(self) -> Cost:
        itemsize = self.up.weight.dtype.itemsize
        return channel_cost(self.geometry, self.rank, itemsize=itemsize, wide=self.wide)

    def extra_repr(self) -> str:
        return f"rank={self.rank}" + ("" if self.wide == "first" else ", wide=last")


def channel_cost(geometry: Geometry, rank: int, *, itemsize: int, wide: Wide = "first") -> Cost:
    """MACs are per output position: with the kernel first both children run at output positions;
    with the kernel last `down` runs at input positions, s times as many in a dimension of stride s.

    Args:
        rank: per group.
        itemsize: bytes of one number.
    """
    taps = geometry.kernel_numbers
    down, up = rank * geometry.in_channels, rank * geometry.out_channels
    if wide == "first":
        down *= taps
        return Cost(down + up, (down + up) * itemsize, down + up)
    up *= taps
    return Cost(down + up, (down + up) * itemsize, down * geometry.positions_read + up)
