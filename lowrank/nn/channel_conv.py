"""A convolution through fewer channels: the kernel to r channels, and a 1×1 convolution on them.

The weight as a matrix W (O, I · K) has rank r: `down` are r filters, `up` mixes them (Denton et
al., arXiv 1404.0736; Zhang et al., arXiv 1505.06798). A 1×1 convolution is a linear layer, and so
are both of its factors.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..types import Cost
from .geometry import Geometry
from .lazy import LazyProduct
from .lowrank_linear import low_rank_cost, own


class ChannelConv(nn.Module):
    """Two real convolutions: `down.weight` (r, I, *kernel), `up.weight` (O, r, 1…), `up.bias` (O,).

    `down` has the stride, padding and dilation of the whole: both work at its output positions.
    """

    WORDS = ("padding_mode",)

    def __init__(self, geometry: Geometry, rank: int, *, bias: bool) -> None:
        """On the meta device; see `from_factors`."""
        super().__init__()
        self.geometry = geometry
        self.down = geometry.spread(geometry.in_channels, rank, bias=False)
        self.up = geometry.pointwise(rank, geometry.out_channels, bias=bias)

    @classmethod
    def from_factors(cls, conv: nn.Module, down: Tensor, up: Tensor) -> Self:
        """`down` (r, I · K) and `up` (O, r) in place of a convolution; its bias is copied."""
        bias = conv.bias
        layer = cls(Geometry.of(conv), down.shape[0], bias=bias is not None)
        layer.down.weight = own(down.reshape(layer._down().shape))
        layer.up.weight = own(up.reshape(layer._up().shape))
        if isinstance(bias, Tensor):
            layer.up.bias = own(bias)
        return layer

    @classmethod
    def empty(cls, *, rank: int, bias: bool, **geometry: Any) -> Self:
        return cls(Geometry.from_spec(geometry), rank, bias=bias)

    @property
    def rank(self) -> int:
        return int(self.up.in_channels)  # type: ignore[arg-type]

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The dense weight (O, I, *kernel), multiplied when it is used."""
        shape = (self.geometry.out_channels, self.geometry.in_channels, *self.geometry.kernel_size)
        return LazyProduct.of(shape, self._up(), lambda: self.dense_weight().view(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, I, *space) -> (B, O, *space')."""
        found: Tensor = self.up(self.down(x))
        return found

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(O, I · K), multiplied in `dtype` (None: that of the factors)."""
        up, down = self._up(), self._down()
        dtype = dtype or up.dtype
        return up.to(dtype).flatten(1) @ down.to(dtype).flatten(1)

    def spec(self) -> dict[str, Any]:
        return {**self.geometry.spec(), "rank": self.rank, "bias": self.bias is not None}

    def cost(self) -> Cost:
        """Products per output position of the whole."""
        up, down = self._up(), self._down()
        return low_rank_cost(len(up), down[0].numel(), self.rank, up.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"

    def _up(self) -> Tensor:
        return self.up.weight  # type: ignore[return-value]

    def _down(self) -> Tensor:
        return self.down.weight  # type: ignore[return-value]
