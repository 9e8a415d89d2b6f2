"""Low rank plus full columns for a few inputs: y = up(down(x)) + columns · x[index].

The form of LOST (arXiv 2508.02668), with both parts weighted by 1 if a trained weight was
decomposed. For training from scratch they are mixed as there, γ · low rank + (1 − γ) · columns,
since γ sets how fast each part learns, and SiLU may stand between the factors; then there is no
dense weight. γ is a number in the spec, not a tensor that a cast to 16 bits would round, and no
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
from .children import is_bare, is_plain, linear_weight
from .form import check_traceable
from .lowrank_linear import DownUp, own

Act = Literal["silu"]
JOINED = 512  # fewest tokens for one product of both parts; benchmarks/sparse_speed.py
CURVED = "SiLU between its factors makes it non-linear"


class Columns(nn.Module):
    """Columns of a weight: `weight` (out, c), `index` (c,) int32, their inputs, ascending."""

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

    def forward(self, x: Tensor, low: Tensor, share: float = 1.0) -> Tensor:
        """x (..., in), low (..., out) -> low + share · columns · x[index]; a call, so that
        offloaded columns are loaded."""
        chosen = x.index_select(-1, self.index)
        rows = chosen.reshape(-1, len(self.index)), low.reshape(-1, low.shape[-1])
        # A fused add to the low-rank part: a separate sum would read all of it again.
        return torch.addmm(rows[1], rows[0], self.weight.T, alpha=share).view(low.shape)


class LowRankSparseLinear(DownUp):
    """Two `nn.Linear` children and columns for the inputs that low rank fits worst.

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
        """The layer of these tensors, which it copies.

        Args:
            down, up, columns: (rank, in), (out, rank), (out, c), of one dtype.
            index: (c,) integers, ascending: the inputs of the columns.
            gamma, act: see the class.

        Raises:
            LowrankError: the index is out of range, not ascending, or of another length.
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
        """Number of inputs with their own column."""
        return len(self.sparse.index)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        check_traceable(self, input)
        share, rest = self._shares()
        inner = self.down(input)
        inner = inner if self.act is None else silu(inner)
        inner = inner if share == 1 else share * inner
        if not self._joins(inner, input):
            y: Tensor = self.sparse(input, self.up(inner), rest)
            return y
        chosen = input.index_select(-1, self.sparse.index)
        both = torch.cat([inner, chosen if rest == 1 else rest * chosen], -1)
        weight = torch.cat([self.up.weight, self.sparse.weight], 1)
        return linear(both, weight, self.up.bias)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors).

        Raises:
            LowrankError: there is SiLU between the factors.
        """
        if self.not_linear:
            raise LowrankError(f"this layer has no dense weight: {self.not_linear}")
        up, down = linear_weight(self.up), linear_weight(self.down)
        dtype = dtype or up.dtype
        share, rest = self._shares()
        low = share * up.to(dtype) @ down.to(dtype)
        return low.index_add(1, self.sparse.index, self.sparse.weight.to(dtype), alpha=rest)

    @property
    def not_linear(self) -> str:
        """Why the layer has no dense weight; "" if it has one."""
        return "" if self.act is None else CURVED

    def fault(self) -> str:
        return index_fault(self.sparse.index, self.in_features, "sparse.index")

    def _joins(self, inner: Tensor, x: Tensor) -> bool:
        """Whether both parts are computed as one product of concatenated tensors: on a CPU, with
        enough tokens to pay for it, without a graph, and if both parts are plain."""
        many = inner.numel() >= JOINED * self.rank
        if not many or not is_plain(self.up) or not is_bare(self.sparse):
            return False
        plain = type(inner) is Tensor and inner.device.type == "cpu"
        alike = inner.dtype == x.dtype == self.up.weight.dtype
        weights = self.up.weight, self.sparse.weight
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (inner, *weights))
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return plain and alike and not graph and not traced

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


def index_fault(index: Tensor, limit: int, name: str) -> str:
    """Why an index is not ascending numbers in [0, limit); "" if it is."""
    ids = index.long()
    if bool((ids < 0).any()) or bool((ids >= limit).any()) or bool((ids.diff() <= 0).any()):
        return f"{name} must hold ascending numbers in [0, {limit - 1}], got {ids.tolist()!r:.60}"
    return ""


def low_rank_sparse_cost(
    out_features: int, in_features: int, rank: int, count: int, *, itemsize: int
) -> Cost:
    """rank · (out + in) + count · out numbers, as many MACs, and four bytes per column.

    Args:
        itemsize: bytes of one number.
    """
    params = rank * (out_features + in_features) + count * out_features
    return Cost(params, params * itemsize + torch.int32.itemsize * count, params)
