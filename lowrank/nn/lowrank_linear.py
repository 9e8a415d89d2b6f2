"""A linear layer as a product of two: y = up(down(x))."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..types import Cost, Size
from .children import linear_weight
from .form import LinearForm
from .last_product import LastProduct


class DownUp(LinearForm):
    """A layer with two `nn.Linear` children, and possibly parts beside or between them."""

    down: nn.Linear
    up: nn.Linear

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.up.bias is not None,
        }

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(DownUp):
    """Two `nn.Linear` children, so that other libraries' tools work without special cases.

    Tensors: `down.weight` (rank, in), `up.weight` (out, rank), `up.bias` (out,). Others may share
    `down` (SharedLowRankLinear); its last product is then cached for them.
    """

    STORAGE = "factors"
    REFITTED = True
    NESTED = True

    _last: LastProduct | None = None  # only if others share `down`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, down: Tensor, up: Tensor, bias: Tensor | None) -> Self:
        """The layer of `down` (rank, in), `up` (out, rank) and `bias`, which it copies."""
        layer = cls.empty(
            in_features=down.shape[1],
            out_features=up.shape[0],
            rank=down.shape[0],
            bias=bias is not None,
        )
        layer.down.weight = own(down)
        layer.up.weight = own(up)
        if bias is not None:
            layer.up.bias = own(bias)
        return layer

    @classmethod
    def empty(cls, *, in_features: int, out_features: int, rank: int, bias: bool) -> Self:
        return cls(in_features, out_features, rank, bias=bias, device="meta")

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return low_rank_cost(*shape, *size, itemsize=itemsize)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        inner = self.down(input)
        if self._last is not None and self._keeps():
            self._last.keep(input, self.down.weight, inner)
        return self.up(inner)

    def last_product(self) -> LastProduct:
        """The cache of down(x) for the layers that share `down`."""
        if self._last is None:
            self._last = LastProduct()
        return self._last

    def shared_product(self, x: Tensor) -> Tensor:
        """down(x) (..., rank), from the cache if this layer last computed it for the same x."""
        if self._last is None or not self._keeps():
            return self.down(x)
        product = self._last.take(x, self.down.weight)
        return self.down(x) if product is None else product

    def _keeps(self) -> bool:
        """Whether a product may be kept: an adapter in place of `down` may change meanwhile."""
        return type(self.down) is nn.Linear and not torch.compiler.is_compiling()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._last is not None:
            self._last.clear()  # casts and moves write to `.data`, bypassing the version counter
        return super()._apply(fn, recurse)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors)."""
        up, down = linear_weight(self.up), linear_weight(self.down)
        dtype = dtype or up.dtype
        return up.to(dtype) @ down.to(dtype)

    def leading(self, rank: int, owner: nn.Module | None = None) -> Self:
        layer = self.from_factors(self.down.weight[:rank], self.up.weight[:, :rank], None)
        layer.up.bias = self.up.bias
        return layer

    def cost(self) -> Cost:
        shape, itemsize = (self.out_features, self.in_features), self.up.weight.dtype.itemsize
        return low_rank_cost(*shape, self.rank, itemsize=itemsize)


def low_rank_cost(out_features: int, in_features: int, rank: int, *, itemsize: int) -> Cost:
    """Cost of plain factors: rank · (out + in) numbers and as many MACs per token.

    Args:
        itemsize: bytes of one number.
    """
    params = rank * (out_features + in_features)
    return Cost(params, params * itemsize, params)


def own(tensor: Tensor) -> nn.Parameter:
    """A parameter that holds a contiguous copy of the tensor."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copy, requires_grad=tensor.dtype.is_floating_point)
