"""A dense basis D with sparse coefficients C: s in every row, y = C · D x, or in every column.

The factorisation of DSFormer (arXiv 2312.13211), which reports no timings and publishes no format:
storage format and forward pass are ours.
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
from .children import linear_weight
from .form import LinearForm, check_traceable
from .lowrank_linear import own

SMALL = 256  # atoms that one byte can index
MOST = 32768  # atoms
LONG = torch.int32  # of two bytes, DistributedDataParallel could not hand it on
LEAST = 4  # fewest tokens for which coefficients are gathered
GATHERED = 128  # tokens · s / r up to which coefficients are gathered; benchmarks/sparse_speed.py


class Coded(LinearForm):
    """The base of both forms: `basis`, and for each row of C the coefficients and their atoms.

    Tensors: `value` (rows, s), `index` (rows, s) in one byte (four above 256 atoms).
    """

    SIZE = ("rank", "count")
    REFITTED = True
    LONGER = frozenset({"index"})

    basis: nn.Linear
    value: nn.Parameter
    index: Tensor

    def _code(
        self, rows: int, rank: int, count: int, shape: tuple[int, int], place: dict[str, Any]
    ) -> None:
        """Create the tensors of C; `shape` of the layer is for the error message."""
        if not 1 <= count <= rank or rank > MOST:
            raise LowrankError(
                f"expected 1 <= count <= rank <= {MOST} for a layer of shape {shape}, "
                f"got {count} coefficients per row on {rank} atoms"
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
        """A layer of this shape that owns copies, its bias not yet set."""
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
        """A note where basis and C, zeros included, have as many entries as the dense weight."""
        sides = [(m.out_features, m.in_features, m.rank) for m in layers]
        slow = sum(rank * (out + inner) >= out * inner for out, inner, rank in sides)
        if not slow:
            return ""
        return (
            f"with many tokens, zero coefficients are multiplied too: {slow} layers need as many "
            "MACs as dense ones or more, and are smaller but not faster"
        )

    def coefficients(self, dtype: torch.dtype | None = None) -> Tensor:
        """C (rows, r) as a dense matrix."""
        value = self.value.to(dtype or self.value.dtype)
        return value.new_zeros(len(value), self.rank).scatter(1, self.index.long(), value)

    def fault(self) -> str:
        rows = self.index.long().sort(1).values
        if bool((rows >= 0).all() & (rows < self.rank).all() & (rows.diff(dim=1) > 0).all()):
            return ""
        return f"index must hold distinct atoms in [0, {self.rank - 1}] in every row"

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
        """Whether a shortcut is allowed: on a CPU, without autograd or tracing."""
        plain = type(inner) is Tensor and inner.device.type == "cpu"
        graph = torch.is_grad_enabled() and (inner.requires_grad or self.value.requires_grad)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return plain and inner.dtype == self.value.dtype and not graph and not traced


class DenseSparseLinear(Coded):
    """Exactly s of the r atoms in every output: y = C (D x).

    Tensors: `basis.weight` (r, in), `value` (out, s), `index` (out, s): the atoms of each output;
    `bias` (out,).
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
        """The layer of these tensors, which it copies.

        Args:
            basis: (r, in); value: (out, s), of one dtype.
            index: (out, s), integers in [0, r), distinct within a row.

        Raises:
            LowrankError: the shapes do not fit, or an index is out of range or repeated.
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

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        check_traceable(self, input)
        inner = self.basis(input)
        if self._gathers(inner):
            y = self._gathered(inner)
            return y if self.bias is None else y + self.bias
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        return F.linear(inner, self.coefficients(inner.dtype), bias)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.value.dtype
        return self.coefficients(dtype) @ linear_weight(self.basis).to(dtype)

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return dense_sparse_cost(*shape, *size, itemsize=itemsize)

    def cost(self) -> Cost:
        shape, itemsize = (self.out_features, self.in_features), self.value.dtype.itemsize
        return dense_sparse_cost(*shape, self.rank, self.count, itemsize=itemsize)

    def _gathers(self, inner: Tensor) -> bool:
        """Whether coefficients are gathered: few tokens, and the shortcut is allowed."""
        tokens = inner.numel() // self.rank
        few = tokens >= LEAST and tokens * self.count <= GATHERED * self.rank
        return few and self._plain(inner)

    def _gathered(self, inner: Tensor) -> Tensor:
        """C · inner as a weighted sum of s rows of innerᵀ per output, in one kernel."""
        rows = inner.reshape(-1, self.rank).T.contiguous()  # (r, tokens)
        y = F.embedding_bag(self.index.int(), rows, per_sample_weights=self.value, mode="sum")
        return y.T.reshape(*inner.shape[:-1], self.out_features)


class SparseDenseLinear(Coded):
    """Exactly s of the r atoms for every input, the transposed form: y = D (Cᵀ x).

    Tensors: `value` (in, s), `index` (in, s): the atoms of each input; `basis.weight` (out, r),
    `basis.bias` (out,).
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
        """The layer of these tensors, which it copies.

        Args:
            basis: (out, r); value: (in, s), of one dtype.
            index: (in, s), integers in [0, r), distinct within a row.

        Raises:
            LowrankError: the shapes do not fit, or an index is out of range or repeated.
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

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        check_traceable(self, input)
        y: Tensor = self.basis(F.linear(input, self.coefficients(input.dtype).T))
        return y

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.value.dtype
        return linear_weight(self.basis).to(dtype) @ self.coefficients(dtype).T

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return sparse_dense_cost(*shape, *size, itemsize=itemsize)

    def cost(self) -> Cost:
        shape, itemsize = (self.out_features, self.in_features), self.value.dtype.itemsize
        return sparse_dense_cost(*shape, self.rank, self.count, itemsize=itemsize)


def _check(index: Tensor, value: Tensor, rank: int) -> None:
    rows = index.long().sort(1).values
    repeated = bool((rows.diff(dim=1) == 0).any())
    if index.shape != value.shape or repeated or not 0 <= rows.min() <= rows.max() < rank:
        raise LowrankError(
            f"expected an index of shape {tuple(value.shape)} with distinct atoms in "
            f"[0, {rank - 1}] in every row, got shape {tuple(index.shape)} with values in "
            f"[{int(rows.min())}, {int(rows.max())}]{', some repeated' * repeated}"
        )


def index_dtype(rank: int) -> torch.dtype:
    """The integer dtype in which `rank` atoms are indexed."""
    return torch.uint8 if rank <= SMALL else LONG


def dense_sparse_cost(
    out_features: int, in_features: int, rank: int, count: int, *, itemsize: int
) -> Cost:
    """rank · in + count · out numbers, as many MACs, and an index per coefficient.

    Args:
        itemsize: bytes of one number.
    """
    params = rank * in_features + count * out_features
    indices = count * out_features * index_dtype(rank).itemsize
    return Cost(params, params * itemsize + indices, params)


def sparse_dense_cost(
    out_features: int, in_features: int, rank: int, count: int, *, itemsize: int
) -> Cost:
    """rank · out + count · in numbers, and an index per coefficient; rank · (out + in) MACs, since
    zeros are multiplied too.

    Args:
        itemsize: bytes of one number.
    """
    stored = dense_sparse_cost(in_features, out_features, rank, count, itemsize=itemsize)
    return replace(stored, macs=rank * (out_features + in_features))
