"""A small dense basis D and s coefficients C in every row, y = C · D x, or in every column.

DSFormer (arXiv 2312.13211) factors weights so; it shows no times and publishes no format, so that
format and forward pass are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LowrankError
from ..types import Cost, Size
from .form import LinearForm
from .lowrank_linear import own

SMALL = 256  # atoms that a byte can number
MOST = 32768  # that two bytes can
LEAST = 4  # tokens from which on coefficients are gathered
GATHERED = 128  # tokens · s / r up to which coefficients are gathered; benchmarks/sparse_speed.py


class Coded(LinearForm):
    """What both have: `basis`, and of each row of C the coefficients and their atoms.

    Tensors: `value` (rows, s), `index` (rows, s) in one byte (two above 256 atoms).
    """

    SIZE = ("rank", "count")
    REFITTED = True

    basis: nn.Linear
    value: nn.Parameter
    index: Tensor

    def _code(
        self, rows: int, rank: int, count: int, shape: tuple[int, int], place: dict[str, Any]
    ) -> None:
        """The tensors of C; `shape` is the layer's, for an error."""
        if not 1 <= count <= rank or rank > MOST:
            raise LowrankError(
                f"expected 1 <= count <= rank <= {MOST} for a layer of shape {shape}: "
                f"{count} coefficients a row cannot be on {rank} atoms"
            )
        self.value = nn.Parameter(torch.empty(rows, count, **place))
        if not self.value.is_meta:
            nn.init.normal_(self.value, std=count**-0.5)
        first = torch.arange(count, dtype=index_dtype(rank), device=place["device"])
        self.register_buffer("index", first.repeat(rows, 1))

    @classmethod
    def empty(
        cls, *, in_features: int, out_features: int, rank: int, count: int, bias: bool
    ) -> Self:
        return cls(in_features, out_features, rank, count, bias=bias, device="meta")

    @classmethod
    def _made(
        cls, shape: tuple[int, int], rank: int, basis: Tensor, value: Tensor, index: Tensor,
        bias: bool,
    ) -> Self:  # fmt: skip
        """A layer of this shape that owns copies; its bias is still to be set."""
        _check(index, value, rank)
        out_features, in_features = shape
        layer = cls.empty(
            in_features=in_features, out_features=out_features, rank=rank, count=value.shape[1],
            bias=bias,
        )  # fmt: skip
        layer.basis.weight, layer.value = own(basis), own(value)
        layer.index = index.to(index_dtype(rank), copy=True).contiguous()
        return layer

    @property
    def in_features(self) -> int:
        raise NotImplementedError

    @property
    def out_features(self) -> int:
        raise NotImplementedError

    @property
    def rank(self) -> int:
        raise NotImplementedError

    @property
    def count(self) -> int:
        return self.value.shape[1]

    @classmethod
    def note(cls, layers: Sequence[Coded]) -> str:
        """Where basis and coefficients, zeros and all, have as many entries as the dense weight."""
        sides = [(m.out_features, m.in_features, m.rank) for m in layers]
        slow = sum(rank * (out + inner) >= out * inner for out, inner, rank in sides)
        if not slow:
            return ""
        return (
            f"zeros of coefficients are multiplied where tokens are many, in {slow} layers as much "
            "as in a dense one or more: these are smaller, not faster"
        )

    def coefficients(self, dtype: torch.dtype | None = None) -> Tensor:
        """C (rows, r), with its zeros."""
        value = self.value.to(dtype or self.value.dtype)
        return value.new_zeros(len(value), self.rank).scatter(1, self.index.long(), value)

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "count": self.count,
            "bias": self.bias is not None,
        }

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank={self.rank}, count={self.count}"

    def _plain(self, inner: Tensor) -> bool:
        """Whether nothing watches the product: on a CPU, no graph, no tracing."""
        plain = type(inner) is Tensor and inner.device.type == "cpu"
        graph = torch.is_grad_enabled() and (inner.requires_grad or self.value.requires_grad)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return plain and inner.dtype == self.value.dtype and not graph and not traced


class DenseSparseLinear(Coded):
    """Exactly s of the r atoms in every output: y = C (D x).

    Tensors: `basis.weight` (r, in), `value` (out, s), `index` (out, s): which atoms an output is
    made of; `bias` (out,).
    """

    STORAGE = "dense-sparse"

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        count: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self._code(out_features, rank, count, (out_features, in_features), place)
        self.basis = nn.Linear(in_features, rank, bias=False, **place)
        shift = nn.Parameter(torch.zeros(out_features, **place)) if bias else None
        self.register_parameter("bias", shift)

    @classmethod
    def from_code(cls, basis: Tensor, value: Tensor, index: Tensor, bias: Tensor | None) -> Self:
        """A layer that owns contiguous copies.

        Args:
            basis: (r, in); value: (out, s), of one dtype.
            index: (out, s), integers in [0, r); no atom twice in a row.

        Raises:
            LowrankError: the shapes do not fit, or an index names no atom, or one twice.
        """
        (rank, in_features), out_features = basis.shape, len(value)
        layer = cls._made((out_features, in_features), rank, basis, value, index, bias is not None)
        if bias is not None:
            layer.bias = own(bias)
        return layer

    @property
    def in_features(self) -> int:
        return self.basis.in_features

    @property
    def out_features(self) -> int:
        return len(self.value)

    @property
    def rank(self) -> int:
        return self.basis.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        inner = self.basis(x)
        if self._gathers(inner):
            y = self._gathered(inner)
            return y if self.bias is None else y + self.bias
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        return F.linear(inner, self.coefficients(inner.dtype), bias)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.value.dtype
        return self.coefficients(dtype) @ self.basis.weight.to(dtype)

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return dense_sparse_cost(*shape, *size, itemsize=itemsize)

    def cost(self) -> Cost:
        shape, itemsize = (self.out_features, self.in_features), self.value.dtype.itemsize
        return dense_sparse_cost(*shape, self.rank, self.count, itemsize=itemsize)

    def _gathers(self, inner: Tensor) -> bool:
        """Whether coefficients are summed one by one: some tokens, and nothing watches."""
        tokens = inner.numel() // self.rank
        few = tokens >= LEAST and tokens * self.count <= GATHERED * self.rank
        return few and self._plain(inner)

    def _gathered(self, inner: Tensor) -> Tensor:
        """C · inner as s rows of innerᵀ weighted and summed for each output, in one kernel."""
        rows = inner.reshape(-1, self.rank).T.contiguous()  # (r, tokens)
        y = F.embedding_bag(self.index.int(), rows, per_sample_weights=self.value, mode="sum")
        return y.T.reshape(*inner.shape[:-1], self.out_features)


class SparseDenseLinear(Coded):
    """Exactly s of the r atoms for every input, the transposed reading: y = D (Cᵀ x).

    Tensors: `value` (in, s), `index` (in, s): which atoms an input goes to; `basis.weight`
    (out, r), `basis.bias` (out,).
    """

    STORAGE = "sparse-dense"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        count: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self._code(in_features, rank, count, (out_features, in_features), place)
        self.basis = nn.Linear(rank, out_features, bias=bias, **place)

    @classmethod
    def from_code(cls, basis: Tensor, value: Tensor, index: Tensor, bias: Tensor | None) -> Self:
        """A layer that owns contiguous copies.

        Args:
            basis: (out, r); value: (in, s), of one dtype.
            index: (in, s), integers in [0, r); no atom twice in a row.

        Raises:
            LowrankError: the shapes do not fit, or an index names no atom, or one twice.
        """
        (out_features, rank), in_features = basis.shape, len(value)
        layer = cls._made((out_features, in_features), rank, basis, value, index, bias is not None)
        if bias is not None:
            layer.basis.bias = own(bias)
        return layer

    @property
    def in_features(self) -> int:
        return len(self.value)

    @property
    def out_features(self) -> int:
        return self.basis.out_features

    @property
    def rank(self) -> int:
        return self.basis.in_features

    @property
    def bias(self) -> Tensor | None:
        return self.basis.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y: Tensor = self.basis(F.linear(x, self.coefficients(x.dtype).T))
        return y

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.value.dtype
        return self.basis.weight.to(dtype) @ self.coefficients(dtype).T

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return sparse_dense_cost(*shape, *size, itemsize=itemsize)

    def cost(self) -> Cost:
        shape, itemsize = (self.out_features, self.in_features), self.value.dtype.itemsize
        return sparse_dense_cost(*shape, self.rank, self.count, itemsize=itemsize)


def _check(index: Tensor, value: Tensor, rank: int) -> None:
    rows = index.long().sort(1).values
    twice = bool((rows.diff(dim=1) == 0).any())
    if index.shape != value.shape or twice or not 0 <= rows.min() <= rows.max() < rank:
        raise LowrankError(
            f"expected an index of shape {tuple(value.shape)} with different atoms in "
            f"[0, {rank - 1}] in every row, got shape {tuple(index.shape)} with values in "
            f"[{int(rows.min())}, {int(rows.max())}]{', some twice' * twice}"
        )


def index_dtype(rank: int) -> torch.dtype:
    """The smallest integers that number so many atoms."""
    return torch.uint8 if rank <= SMALL else torch.int16


def dense_sparse_cost(
    out_features: int, in_features: int, rank: int, count: int, *, itemsize: int
) -> Cost:
    """rank · in + count · out numbers, as many products, and an index for each coefficient.

    Args:
        itemsize: bytes of one number.
    """
    params = rank * in_features + count * out_features
    indices = count * out_features * index_dtype(rank).itemsize
    return Cost(params, params * itemsize + indices, params)


def sparse_dense_cost(
    out_features: int, in_features: int, rank: int, count: int, *, itemsize: int
) -> Cost:
    """rank · out + count · in numbers, and an index for each coefficient; rank · (out + in)
    products, for zeros are multiplied too.

    Args:
        itemsize: bytes of one number.
    """
    stored = dense_sparse_cost(in_features, out_features, rank, count, itemsize=itemsize)
    return replace(stored, macs=rank * (out_features + in_features))
