"""A linear layer of some columns and rows of a weight: y = C (U (R x))."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from ..types import Cost, Size
from .children import linear_weight
from .lowrank_linear import DownUp, own


class CURLinear(DownUp):
    """Three `nn.Linear` children, y = up(core(down(x))).

    Tensors: `down.weight` R (rank, in), rows of the weight; `core.weight` U (rank, rank);
    `up.weight` C (out, rank), columns of the weight; `up.bias` (out,). Recovery does not refit it:
    C and R would no longer be the weight's own.
    """

    STORAGE = "cur"

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
        self.core = nn.Linear(rank, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_parts(cls, columns: Tensor, core: Tensor, rows: Tensor, bias: Tensor | None) -> Self:
        """The layer of C (out, rank), U (rank, rank), R (rank, in) and `bias`, which it copies."""
        layer = cls.empty(
            in_features=rows.shape[1],
            out_features=columns.shape[0],
            rank=rows.shape[0],
            bias=bias is not None,
        )
        layer.down.weight, layer.core.weight, layer.up.weight = map(own, (rows, core, columns))
        if bias is not None:
            layer.up.bias = own(bias)
        return layer

    @classmethod
    def empty(cls, *, in_features: int, out_features: int, rank: int, bias: bool) -> Self:
        return cls(in_features, out_features, rank, bias=bias, device="meta")

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return cur_cost(*shape, *size, itemsize=itemsize)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        return self.up(self.core(self.down(input)))

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors)."""
        up, core, down = map(linear_weight, (self.up, self.core, self.down))
        dtype = dtype or up.dtype
        return up.to(dtype) @ (core.to(dtype) @ down.to(dtype))

    def cost(self) -> Cost:
        shape, itemsize = (self.out_features, self.in_features), self.up.weight.dtype.itemsize
        return cur_cost(*shape, self.rank, itemsize=itemsize)


def cur_cost(out_features: int, in_features: int, rank: int, *, itemsize: int) -> Cost:
    """Cost of C, U and R: rank · (out + in + rank) numbers and as many MACs per token.

    Args:
        itemsize: bytes of one number.
    """
    params = rank * (out_features + in_features + rank)
    return Cost(params, params * itemsize, params)
