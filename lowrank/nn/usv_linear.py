"""A linear layer as U S Vᵀ with orthonormal U and V, for rank-adaptive training."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..types import Cost
from .children import linear_weight
from .lowrank_linear import DownUp


class USVLinear(DownUp):
    """Three `nn.Linear` children, y = up(core(down(x))).

    Tensors: `down.weight` Vᵀ (rank_in, in) with orthonormal rows, `core.weight` S
    (rank_out, rank_in), `up.weight` U (out, rank_out) with orthonormal columns, `up.bias` (out,).
    The two ranks differ only while a basis is augmented.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank_in: int,
        rank_out: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank_in, bias=False, device=device, dtype=dtype)
        self.core = nn.Linear(rank_in, rank_out, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank_out, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None) -> Self:
        """The layer of U (out, a), S (a, b), V (in, b), copied; a bias Parameter is not copied."""
        layer = cls.empty(
            in_features=v.shape[0],
            out_features=u.shape[0],
            rank_in=v.shape[1],
            rank_out=u.shape[1],
            bias=bias is not None,
        )
        layer.set_factors(u, s, v)
        if bias is not None:
            layer.up.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.clone())
        return layer

    @classmethod
    def empty(
        cls, *, in_features: int, out_features: int, rank_in: int, rank_out: int, bias: bool
    ) -> Self:
        return cls(in_features, out_features, rank_in, rank_out, bias=bias, device="meta")

    def set_factors(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        """Replace the parameters by copies of U (out, a), S (a, b), V (in, b), of any ranks."""
        for child, tensor in ((self.up, u), (self.core, s), (self.down, v.T)):
            copy = tensor.detach().clone(memory_format=torch.contiguous_format)
            child.weight = nn.Parameter(copy)
            child.out_features, child.in_features = copy.shape

    @property
    def u(self) -> Tensor:
        """(out, rank_out), orthonormal columns."""
        return self.up.weight

    @property
    def s(self) -> Tensor:
        """(rank_out, rank_in)."""
        return self.core.weight

    @property
    def v(self) -> Tensor:
        """(in, rank_in), orthonormal columns: a view of `down.weight`."""
        return self.down.weight.T

    @property
    def rank(self) -> int:
        return min(self.core.weight.shape)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        return self.up(self.core(self.down(input)))

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors)."""
        up, core, down = map(linear_weight, (self.up, self.core, self.down))
        dtype = dtype or up.dtype
        return up.to(dtype) @ core.to(dtype) @ down.to(dtype)

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank_in": self.down.out_features,
            "rank_out": self.up.in_features,
            "bias": self.up.bias is not None,
        }

    def cost(self) -> Cost:
        rank_out, rank_in = self.core.weight.shape
        params = self.out_features * rank_out + rank_out * rank_in + rank_in * self.in_features
        return Cost(params, params * self.up.weight.dtype.itemsize, params)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
