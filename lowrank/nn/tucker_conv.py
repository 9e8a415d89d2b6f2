"""A convolution in Tucker-2 form: 1×1, the kernel on fewer channels, and 1×1.

y = last(core(first(x))): 1×1 to r_in channels, the kernel from r_in to r_out, 1×1 to all outputs
(Kim et al., arXiv 1511.06530). In a grouped convolution every group has its own factors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..types import Cost
from .factored_conv import ConvSequence
from .geometry import Geometry, fill, fill_bias, per_group


class TuckerConv(ConvSequence):
    """Three nn.Conv children, y = last(core(first(x))), with g groups.

    Tensors: `first.weight` (g·r_in, I/g, 1…), `core.weight` (g·r_out, r_in, *kernel), `last.weight`
    (O, r_out, 1…), `last.bias` (O,). The core has the original stride, padding and dilation:
    `first` is pointwise and without bias, so padding before or after it is the same. The module has
    the attributes of an nn.Conv; `ranks` are per group.
    """

    STORAGE = "tucker"
    SIZE = ("r_out", "r_in")
    REFITTED = True
    OUT = "last"

    def __init__(self, geometry: Geometry, ranks: tuple[int, int], *, bias: bool) -> None:
        """Built on the meta device; see `from_parts`."""
        super().__init__()
        self.geometry, self.ranks = geometry, ranks
        geometry.label(self)
        r_out, r_in = (geometry.groups * rank for rank in ranks)
        self.first = geometry.pointwise(geometry.in_channels, r_in, bias=False)
        self.core = geometry.spread(r_in, r_out, bias=False)
        self.last = geometry.pointwise(r_out, geometry.out_channels, bias=bias)

    @classmethod
    def from_parts(cls, conv: nn.Module, last: Tensor, core: Tensor, first: Tensor) -> Self:
        """The factored form of `conv`, in its dtype and on its device; the bias is copied.

        Args:
            conv: nn.Conv1d, 2d or 3d.
            last: (O, r_out).
            core: (g·r_out, r_in, K).
            first: (g·r_in, I/g).

        Raises:
            LowrankError: the parts do not fit the convolution.
        """
        geometry, bias, weight = Geometry.of(conv), conv.bias, conv.weight
        r_out = per_group(core.shape[0], geometry.groups, "rows of `core`")
        layer = cls(geometry, (r_out, core.shape[1]), bias=bias is not None)
        for name, part in (("first", first), ("core", core), ("last", last)):
            fill(getattr(layer, name), part, weight, f"`{name}`")  # type: ignore[arg-type]
        fill_bias(layer.last, bias)  # type: ignore[arg-type]
        return layer

    @classmethod
    def of_children(cls, first: nn.Module, core: nn.Module, last: nn.Module) -> Self:
        """The module of three existing convolutions, which are held, not copied."""
        middle = Geometry.of(core)
        ends = {"in_channels": first.in_channels, "out_channels": last.out_channels}
        whole = replace(middle, **ends)  # type: ignore[arg-type]
        ranks = (middle.out_channels // middle.groups, middle.in_channels // middle.groups)
        layer = cls(whole, ranks, bias=last.bias is not None)
        layer.first, layer.core, layer.last = first, core, last  # type: ignore[assignment]
        return layer

    @classmethod
    def empty(cls, *, r_out: int, r_in: int, bias: bool, **geometry: Any) -> Self:
        return cls(Geometry.from_spec(geometry), (r_out, r_in), bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """input (B, I, *space) -> (B, O, *space')."""
        output: Tensor = self.last(self.core(self.first(input)))
        return output

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (O, I/g · K), computed in `dtype` (None: that of the factors)."""
        dtype = dtype or self.last.weight.dtype
        groups = (self.geometry.groups, -1)
        first = self.first.weight.to(dtype).flatten(1).unflatten(0, groups)  # (g, r_in, I/g)
        core = self.core.weight.to(dtype).flatten(2).unflatten(0, groups)  # (g, r_out, r_in, K)
        last = self.last.weight.to(dtype).flatten(1).unflatten(0, groups)  # (g, O/g, r_out)
        mixed = torch.einsum("gpjk,gji->gpik", core, first).flatten(2)
        return (last @ mixed).flatten(0, 1)

    def spec(self) -> dict[str, Any]:
        r_out, r_in = self.ranks
        sizes = {"r_out": r_out, "r_in": r_in, "bias": self.bias is not None}
        return {**self.geometry.spec(), **sizes}

    def cost(self) -> Cost:
        return tucker_cost(self.geometry, *self.ranks, itemsize=self.last.weight.dtype.itemsize)

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}"


def tucker_cost(geometry: Geometry, r_out: int, r_in: int, *, itemsize: int) -> Cost:
    """MACs are per output position; `first` runs at input positions, s times as many in a dimension
    of stride s.

    Args:
        r_out, r_in: per group.
        itemsize: bytes of one number.
    """
    first = r_in * geometry.in_channels
    core = geometry.groups * r_in * r_out * geometry.kernel_numbers
    last = r_out * geometry.out_channels
    params = first + core + last
    macs = first * geometry.positions_read + core + last
    return Cost(params, params * itemsize, macs)
