"""A convolution in Tucker-2 form: fewer channels in, the kernel on them, and out again.

y = last(core(first(x))): 1×1 to r_in channels, the kernel from r_in to r_out, 1×1 to all outputs
(Kim et al., arXiv 1511.06530).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..types import Cost
from .geometry import Geometry
from .lazy import LazyProduct
from .lowrank_linear import own


class TuckerConv(nn.Module):
    """Three real convolutions: `first.weight` (r_in, I, 1…), `core.weight` (r_out, r_in, *kernel),
    `last.weight` (O, r_out, 1…), `last.bias` (O,).

    The core has the stride, padding and dilation of the whole: what `first` does not do to a
    position, padding it before or after is the same.
    """

    WORDS = ("padding_mode",)

    def __init__(self, geometry: Geometry, ranks: tuple[int, int], *, bias: bool) -> None:
        """On the meta device; see `from_parts`."""
        super().__init__()
        r_out, r_in = ranks
        self.geometry = geometry
        self.first = geometry.pointwise(geometry.in_channels, r_in, bias=False)
        self.core = geometry.spread(r_in, r_out, bias=False)
        self.last = geometry.pointwise(r_out, geometry.out_channels, bias=bias)

    @classmethod
    def from_parts(cls, conv: nn.Module, last: Tensor, core: Tensor, first: Tensor) -> Self:
        """`last` (O, r_out), `core` (r_out, r_in, K), `first` (r_in, I) in place of a convolution,
        in its dtype; its bias is copied."""
        weight, bias = conv.weight, conv.bias
        layer = cls(Geometry.of(conv), (core.shape[0], core.shape[1]), bias=bias is not None)
        parts = {"first": first, "core": core, "last": last}
        for name, part in parts.items():
            child: Any = getattr(layer, name)
            child.weight = own(part.to(weight).reshape(child.weight.shape))  # type: ignore[arg-type]
        if isinstance(bias, Tensor):
            layer.last.bias = own(bias)
        return layer

    @classmethod
    def of_children(cls, first: nn.Module, core: nn.Module, last: nn.Module) -> Self:
        """Of three convolutions that are there already: they are held, not copied."""
        middle = Geometry.of(core)
        ends = {"in_channels": first.in_channels, "out_channels": last.out_channels}
        whole = replace(middle, **ends)  # type: ignore[arg-type]
        ranks = (middle.out_channels, middle.in_channels)
        layer = cls(whole, ranks, bias=last.bias is not None)
        layer.first, layer.core, layer.last = first, core, last
        return layer

    @classmethod
    def empty(cls, *, r_out: int, r_in: int, bias: bool, **geometry: Any) -> Self:
        return cls(Geometry.from_spec(geometry), (r_out, r_in), bias=bias)

    @property
    def ranks(self) -> tuple[int, int]:
        """(r_out, r_in)."""
        core = self._weight("core")
        return (core.shape[0], core.shape[1])

    @property
    def bias(self) -> Tensor | None:
        return self.last.bias  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The dense weight (O, I, *kernel), multiplied when it is used."""
        shape = (self.geometry.out_channels, self.geometry.in_channels, *self.geometry.kernel_size)
        return LazyProduct.of(shape, self._weight("last"), lambda: self.dense_weight().view(shape))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, I, *space) -> (B, O, *space')."""
        found: Tensor = self.last(self.core(self.first(x)))
        return found

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(O, I · K), multiplied in `dtype` (None: that of the factors)."""
        last, core, first = (self._weight(name) for name in ("last", "core", "first"))
        dtype = dtype or last.dtype
        mixed = torch.einsum(
            "pjk,ji->pik", core.to(dtype).flatten(2), first.to(dtype).flatten(1)
        ).flatten(1)
        return last.to(dtype).flatten(1) @ mixed

    def spec(self) -> dict[str, Any]:
        r_out, r_in = self.ranks
        sizes = {"r_out": r_out, "r_in": r_in, "bias": self.bias is not None}
        return {**self.geometry.spec(), **sizes}

    def cost(self) -> Cost:
        return tucker_cost(self.geometry, *self.ranks, itemsize=self._weight("last").itemsize)

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}"

    def _weight(self, name: str) -> Tensor:
        found: Tensor = getattr(self, name).weight
        return found


def tucker_cost(geometry: Geometry, r_out: int, r_in: int, *, itemsize: int) -> Cost:
    """Products per output position; `first` works at every input position, of which a stride of s
    leaves s times as many in each dimension."""
    first = r_in * geometry.in_channels
    core = r_in * r_out * geometry.kernel_numbers
    last = r_out * geometry.out_channels
    params = first + core + last
    macs = first * math.prod(geometry.stride) + core + last
    return Cost(params, params * itemsize, macs)
