"""Low rank, and a few inputs that are read in full: y = up(down(x)) + columns · x[index].

The form of LOST (arXiv 2508.02668), with unit weights on both parts where a trained weight was
decomposed. Trained from scratch the parts are mixed as there, γ · low rank + (1 − γ) · columns, for
γ decides how fast each of them learns, and SiLU may stand between the factors; then there is no
dense weight. γ is a number of the spec, not a tensor that a cast to 16 bits would round, and no
bias is added where there was none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ..errors import LowrankError, unknown
from ..types import Cost, Size
from .lowrank_linear import DownUp, own

Act = Literal["silu"]
JOINED = 512  # tokens from which on both parts are one product; benchmarks/sparse_speed.py
CURVED = "SiLU stands between its factors, so that no matrix does what it does"


class Columns(nn.Module):
    """Tensors: `weight` (out, c), `index` (c,) int32, ascending: the inputs that it multiplies."""

    index: Tensor

    def __init__(
        self,
        out_features: int,
        count: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, count, device=device, dtype=dtype))
        first = torch.arange(count, dtype=torch.int32, device=device)
        self.register_buffer("index", first)


class LowRankSparseLinear(DownUp):
    """Two real `nn.Linear` children, and columns for the inputs that the low rank serves worst.

    Tensors: `down.weight` (rank, in), `up.weight` (out, rank), `up.bias` (out,), `sparse.weight`
    (out, c), `sparse.index` (c,) int32.

    Attributes:
        gamma: γ in [0, 1] of γ · low rank + (1 − γ) · columns, or None: their plain sum.
        act: "silu" between the factors, or None.
    """

    STORAGE = "lowrank-sparse"
    SIZE = ("rank", "count")
    WORDS = frozenset({"act"})
    SHARES = frozenset({"gamma"})
    REFITTED = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        count: int,
        *,
        bias: bool = True,
        gamma: float | None = None,
        act: Act | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= count <= in_features:
            raise LowrankError(
                f"count must be in [1, {in_features}], the inputs of a layer of shape "
                f"({out_features}, {in_features}), got {count}"
            )
        if gamma is not None and not 0 <= gamma <= 1:
            raise LowrankError(f"gamma must be in [0, 1], or None for a plain sum, got {gamma!r}")
        if act is not None and act not in get_args(Act):
            raise unknown("act", str(act), get_args(Act))
        self.gamma, self.act = gamma, act
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Linear(in_features, rank, bias=False, **place)
        self.up = nn.Linear(rank, out_features, bias=bias, **place)
        self.sparse = Columns(out_features, count, **place)

    @classmethod
    def from_parts(
        cls,
        down: Tensor,
        up: Tensor,
        columns: Tensor,
        index: Tensor,
        bias: Tensor | None,
        *,
        gamma: float | None = None,
        act: Act | None = None,
    ) -> Self:
        """A layer that owns contiguous copies.

        Args:
            down, up, columns: (rank, in), (out, rank), (out, c), of one dtype.
            index: (c,) integers, ascending: the inputs that the columns belong to.
            gamma, act: see the class.

        Raises:
            LowrankError: the index names no input, or is not ascending, or of another length.
        """
        (rank, in_features), (out_features, count) = down.shape, columns.shape
        rising = len(index) == count and bool((index.diff() > 0).all())
        if not rising or not 0 <= int(index[0]) <= int(index[-1]) < in_features:
            raise LowrankError(
                f"expected {count} ascending inputs in [0, {in_features - 1}], "
                f"got {index.tolist()!r:.80}"
            )
        layer = cls.empty(
            in_features=in_features, out_features=out_features, rank=rank, count=count,
            bias=bias is not None, gamma=gamma, act=act,
        )  # fmt: skip
        layer.down.weight, layer.up.weight = own(down), own(up)
        layer.sparse.weight = own(columns)
        layer.sparse.index = index.to(torch.int32, copy=True).contiguous()
        if bias is not None:
            layer.up.bias = own(bias)
        return layer

    @classmethod
    def empty(
        cls,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        count: int,
        bias: bool,
        gamma: float | None = None,
        act: Act | None = None,
    ) -> Self:
        sizes = in_features, out_features, rank, count
        return cls(*sizes, bias=bias, gamma=gamma, act=act, device="meta")

    @property
    def count(self) -> int:
        """Inputs that have a column of their own."""
        return len(self.sparse.index)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        share, rest = self._shares()
        inner = self.down(x)
        inner = inner if self.act is None else silu(inner)
        inner = inner if share == 1 else share * inner
        chosen = x.index_select(-1, self.sparse.index)
        if self._joins(inner, chosen):
            both = torch.cat([inner, chosen if rest == 1 else rest * chosen], -1)
            weight = torch.cat([self.up.weight, self.sparse.weight], 1)
            return linear(both, weight, self.up.bias)
        low = self.up(inner)
        rows = chosen.reshape(-1, self.count), low.reshape(-1, self.out_features)
        # One product that adds to the low-rank part: a sum of its own would read all of it again.
        return torch.addmm(rows[1], rows[0], self.sparse.weight.T, alpha=rest).view(low.shape)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in), multiplied in `dtype` (None: that of the factors).

        Raises:
            LowrankError: SiLU stands between the factors.
        """
        if self.not_linear:
            raise LowrankError(f"this layer has no dense weight: {self.not_linear}")
        dtype = dtype or self.up.weight.dtype
        share, rest = self._shares()
        low = share * self.up.weight.to(dtype) @ self.down.weight.to(dtype)
        return low.index_add(1, self.sparse.index, self.sparse.weight.to(dtype), alpha=rest)

    @property
    def not_linear(self) -> str:
        """Why no dense weight stands for this layer; "" if one does."""
        return "" if self.act is None else CURVED

    def _joins(self, inner: Tensor, chosen: Tensor) -> bool:
        """Whether both parts are one product of joined tensors: on a CPU, so many tokens that the
        joining is worth it, and no graph."""
        many = inner.numel() >= JOINED * self.rank
        plain = type(inner) is Tensor and inner.device.type == "cpu"
        alike = inner.dtype == chosen.dtype == self.up.weight.dtype
        weights = self.up.weight, self.sparse.weight
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (inner, *weights))
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return many and plain and alike and not graph and not traced

    def _shares(self) -> tuple[float, float]:
        return (1.0, 1.0) if self.gamma is None else (self.gamma, 1.0 - self.gamma)

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "count": self.count,
            "bias": self.up.bias is not None,
            **self._mixed(),
        }

    def _mixed(self) -> dict[str, Any]:
        both = {"gamma": self.gamma, "act": self.act}
        return {key: value for key, value in both.items() if value is not None}

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return low_rank_sparse_cost(*shape, *size, itemsize=itemsize)

    def cost(self) -> Cost:
        shape, itemsize = (self.out_features, self.in_features), self.up.weight.dtype.itemsize
        return low_rank_sparse_cost(*shape, self.rank, self.count, itemsize=itemsize)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        mixed = "".join(f", {key}={value}" for key, value in self._mixed().items())
        return f"{sizes}, rank={self.rank}, count={self.count}{mixed}"


def low_rank_sparse_cost(
    out_features: int, in_features: int, rank: int, count: int, *, itemsize: int
) -> Cost:
    """rank · (out + in) + count · out numbers, as many products, and four bytes for each input.

    Args:
        itemsize: bytes of one number.
    """
    params = rank * (out_features + in_features) + count * out_features
    return Cost(params, params * itemsize + torch.int32.itemsize * count, params)
