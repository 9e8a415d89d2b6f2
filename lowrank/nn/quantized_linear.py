"""Linear layers of integers of few bits: the weight, its factors, or the weight less its factors.

They are for files and memory: every call decodes the codes and multiplies by what they stand for,
which is not faster than the dense layer. Fast products of integers are torchao's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..types import Cost, Size
from .codes import Codes, codes_cost
from .form import LinearForm, check_traceable
from .lowrank_linear import own


class Coded(LinearForm):
    """The base of the three forms: y = whole(x) + up(down(x)) + bias, of which one may be missing.

    Tensors of each of `whole` (out, in), `down` (rank, in) and `up`, stored as (rank, out): codes
    and scales, see `Codes`; `bias` (out,).
    """

    CODED = True
    REFITTED = True

    whole: Codes | None
    down: Codes | None
    up: Codes | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        whole: tuple[int, int] | None = None,
        factors: tuple[int, int] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            whole: bits and group of the weight, or of what it is beside the factors.
            factors: rank and bits of the factors; a row of each is one group.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("whole", "down", "up"):
            self.register_module(name, None)
        if whole is not None:
            self.whole = Codes(out_features, in_features, *whole, **place)
        if factors is not None:
            rank, bits = factors
            self.down = Codes(rank, in_features, bits, in_features, **place)
            self.up = Codes(rank, out_features, bits, out_features, turned=True, **place)
        shift = nn.Parameter(torch.zeros(out_features, **place)) if bias else None
        self.register_parameter("bias", shift)

    def hold(self, *, bias: Tensor | None = None, **parts: tuple[Tensor, Tensor]) -> Self:
        """Take codes and scales of `whole`, `down` and `up`, and the bias, all copied."""
        for name, (codes, scale) in parts.items():
            getattr(self, name).hold(codes, scale)
        if bias is not None:
            self.bias = own(bias)
        return self

    @classmethod
    def note(cls, layers: Sequence[Coded]) -> str:
        return (
            f"{len(layers)} layers hold integers of few bits, which every call decodes: they are "
            "smaller, not faster"
        )

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        check_traceable(self, input)
        y = None if self.whole is None else self.whole(input)
        if self.down is not None and self.up is not None:
            low = self.up(self.down(input))
            y = low if y is None else y + low
        assert y is not None
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        weight = None if self.whole is None else self.whole.dense(dtype)
        if self.down is not None and self.up is not None:
            low = self.up.dense(dtype).T @ self.down.dense(dtype)
            weight = low if weight is None else weight + low
        assert weight is not None
        return weight

    def spec(self) -> dict[str, Any]:
        size = dict(zip(self.SIZE, self.size, strict=True))
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, **size, "bias": self.bias is not None}

    @property
    def size(self) -> Size:
        """The integers of `SIZE`."""
        raise NotImplementedError

    def cost(self) -> Cost:
        shape = self.out_features, self.in_features
        scale = next(self.parameters())
        cost = type(self).size_cost(shape, self.size, itemsize=scale.dtype.itemsize)
        assert cost is not None
        return cost

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class QuantizedLinear(Coded):
    """A weight of codes: `whole.codes`, `whole.scale`, `bias`."""

    STORAGE = "quantized"
    SIZE = ("bits", "group")

    whole: Codes

    @classmethod
    def empty(
        cls, *, in_features: int, out_features: int, bits: int, group: int, bias: bool
    ) -> Self:
        return cls(in_features, out_features, whole=(bits, group), bias=bias, device="meta")

    @property
    def size(self) -> Size:
        return self.whole.bits, self.whole.group

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return quantized_cost(shape, whole=size, itemsize=itemsize)


class QuantizedFactorsLinear(Coded):
    """Factors of codes: `down.codes`, `down.scale`, `up.codes`, `up.scale`, `bias`."""

    STORAGE = "quantized-factors"
    SIZE = ("rank", "bits")

    down: Codes
    up: Codes

    @classmethod
    def empty(
        cls, *, in_features: int, out_features: int, rank: int, bits: int, bias: bool
    ) -> Self:
        return cls(in_features, out_features, factors=(rank, bits), bias=bias, device="meta")

    @property
    def rank(self) -> int:
        return self.down.rows

    @property
    def size(self) -> Size:
        return self.rank, self.down.bits

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return quantized_cost(shape, factors=size, itemsize=itemsize)


class QuantizedLowRankLinear(Coded):
    """Factors of codes, and the codes of what they leave: the tensors of both other forms."""

    STORAGE = "quantized-lowrank"
    SIZE = ("rank", "factor_bits", "bits", "group")

    whole: Codes
    down: Codes
    up: Codes

    @classmethod
    def empty(
        cls,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        factor_bits: int,
        bits: int,
        group: int,
        bias: bool,
    ) -> Self:
        return cls(
            in_features, out_features, whole=(bits, group), factors=(rank, factor_bits),
            bias=bias, device="meta",
        )  # fmt: skip

    @property
    def rank(self) -> int:
        return self.down.rows

    @property
    def size(self) -> Size:
        return self.rank, self.down.bits, self.whole.bits, self.whole.group

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return quantized_cost(shape, whole=size[2:], factors=size[:2], itemsize=itemsize)


def quantized_cost(
    shape: Sequence[int], *, whole: Size | None = None, factors: Size | None = None, itemsize: int
) -> Cost:
    """The scales as parameters, the bytes of scales and codes, and the products of both parts.

    Args:
        shape: (out, in).
        whole: bits and group.
        factors: rank and bits.
        itemsize: bytes of one scale.
    """
    (out_features, in_features), cost = shape, Cost(0, 0, 0)
    parts = [(out_features, in_features, *whole)] if whole else []
    if factors:
        rank, bits = factors
        parts += [(rank, side, bits, side) for side in (in_features, out_features)]
    for rows, columns, bits, group in parts:
        cost = cost + Cost(*codes_cost(rows, columns, bits, group, itemsize), rows * columns)
    return cost
