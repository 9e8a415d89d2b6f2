"""Low rank plus sparse: y = up(down(x)) + S x, with S zero off a mask.

The form of OATS (arXiv 2409.13652); storage format and forward pass are ours. A bitmask marks the
kept entries, whose values are stored row by row: for 2:4 that is as compact as storing positions,
and it serves any pattern. S is expanded and multiplied as a dense matrix: the layer is smaller than
the dense one, but not faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LowrankError
from ..types import Cost, Size
from .children import linear_weight
from .form import check_traceable
from .lowrank_linear import DownUp, own

BITS = 8


class Masked(nn.Module):
    """A sparse matrix: `weight` (k,), the kept entries row by row; `mask` (out, ⌈in / 8⌉) uint8,
    where bit j mod 8, least significant first, of byte ⌊j / 8⌋ is set if entry j is kept."""

    mask: Tensor
    packed: Tensor | None = None  # see sparse_kernels.py

    def __init__(
        self,
        in_features: int,
        out_features: int,
        count: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.zeros(count, device=device, dtype=dtype))
        if self.weight.is_meta:
            packed = torch.zeros(
                out_features, -(-in_features // BITS), dtype=torch.uint8, device=device
            )
        else:  # keep the first `count` entries
            first = torch.arange(out_features * in_features, device=device) < count
            packed = pack(first.view(out_features, in_features))
        self.register_buffer("mask", packed)

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        """x (..., in), low (..., out) -> low + S x; a call, so that offloaded parts are loaded."""
        if self.packed is not None:
            return low + F.linear(x.to(low.dtype), self.packed)
        rows = x.reshape(-1, self.in_features), low.reshape(-1, low.shape[-1])
        spread = self.dense(low.dtype)
        return torch.addmm(rows[1], rows[0].to(low.dtype), spread.T).view(low.shape)

    def kept(self) -> Tensor:
        """The mask (out, in), bool."""
        return unpack(self.mask, self.in_features)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """S (out, in) as a dense matrix."""
        mask = self.kept()
        weight = self.weight.to(dtype or self.weight.dtype)
        return weight.new_zeros(mask.shape).masked_scatter(mask, weight)


class LowRankMaskedLinear(DownUp):
    """Two `nn.Linear` children and a sparse matrix of the entries that low rank fits worst.

    Tensors: `down.weight` (rank, in), `up.weight` (out, rank), `up.bias` (out,), `sparse.weight`
    (k,), `sparse.mask` (out, ⌈in / 8⌉) uint8.
    """

    STORAGE = "lowrank-masked"
    SIZE = ("rank", "count")
    REFITTED = True

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
        if not 1 <= count <= in_features * out_features:
            raise LowrankError(
                f"count must be in [1, {in_features * out_features}], the entries of a weight of "
                f"shape ({out_features}, {in_features}), got {count}"
            )
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Linear(in_features, rank, bias=False, **place)
        self.up = nn.Linear(rank, out_features, bias=bias, **place)
        self.sparse = Masked(in_features, out_features, count, **place)

    @classmethod
    def from_parts(
        cls, down: Tensor, up: Tensor, sparse: Tensor, mask: Tensor, bias: Tensor | None
    ) -> Self:
        """The layer of these tensors, which it copies.

        Args:
            down, up, sparse: (rank, in), (out, rank), (out, in), of one dtype.
            mask: (out, in), bool: the entries of `sparse` to keep.

        Raises:
            LowrankError: shapes do not fit, or the mask keeps nothing.
        """
        (rank, in_features), out_features = down.shape, len(up)
        shape, count = (out_features, in_features), int(mask.sum())
        if mask.shape != shape or sparse.shape != shape or mask.dtype != torch.bool:
            raise LowrankError(
                f"expected entries and a bool mask of shape {shape}, got {tuple(sparse.shape)} and "
                f"{mask.dtype} of {tuple(mask.shape)}"
            )
        layer = cls.empty(
            in_features=in_features, out_features=out_features, rank=rank, count=count,
            bias=bias is not None,
        )  # fmt: skip
        layer.down.weight, layer.up.weight = own(down), own(up)
        layer.sparse.weight, layer.sparse.mask = own(sparse[mask]), pack(mask)
        if bias is not None:
            layer.up.bias = own(bias)
        return layer

    @classmethod
    def empty(
        cls, *, in_features: int, out_features: int, rank: int, count: int, bias: bool
    ) -> Self:
        return cls(in_features, out_features, rank, count, bias=bias, device="meta")

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return low_rank_masked_cost(*shape, *size, itemsize=itemsize)

    @classmethod
    def note(cls, layers: Sequence[Self]) -> str:
        return (
            f"masked zeros are multiplied too, so that {len(layers)} layers are not faster than "
            "dense ones"
        )

    @property
    def count(self) -> int:
        """Number of kept entries."""
        return len(self.sparse.weight)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        check_traceable(self, input)
        y: Tensor = self.sparse(input, self.up(self.down(input)))
        return y

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors)."""
        up, down = linear_weight(self.up), linear_weight(self.down)
        dtype = dtype or up.dtype
        return up.to(dtype) @ down.to(dtype) + self.sparse.dense(dtype)

    def fault(self) -> str:
        kept, bits = int(self.sparse.kept().sum()), 8 * self.sparse.mask.shape[1]
        if kept != self.count or bool(unpack(self.sparse.mask, bits)[:, self.in_features :].any()):
            return f"sparse.mask must keep {self.count} entries, all within its rows, got {kept}"
        return ""

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "count": self.count,
            "bias": self.up.bias is not None,
        }

    def cost(self) -> Cost:
        shape, itemsize = (self.out_features, self.in_features), self.up.weight.dtype.itemsize
        return low_rank_masked_cost(*shape, self.rank, self.count, itemsize=itemsize)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, rank={self.rank}, count={self.count}"


def low_rank_masked_cost(
    out_features: int, in_features: int, rank: int, count: int, *, itemsize: int
) -> Cost:
    """rank · (out + in) + count numbers, one bit per entry, and the MACs of the dense layer plus
    those of the factors, since zeros are multiplied too.

    Args:
        itemsize: bytes of one number.
    """
    factors = rank * (out_features + in_features)
    params, bits = factors + count, out_features * -(-in_features // BITS)
    return Cost(params, params * itemsize + bits, factors + out_features * in_features)


def pack(mask: Tensor) -> Tensor:
    """A bool mask (out, in) as bits, eight entries of a row per byte, (out, ⌈in / 8⌉) uint8."""
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[1] % BITS))
    places = torch.arange(BITS, dtype=torch.uint8, device=mask.device)
    parts = padded.view(len(mask), -1, BITS) << places
    return parts.sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """The mask (out, in), bool."""
    # A comparison with masks and no shift, which ONNX does not have for tensors.
    places = 2 ** torch.arange(BITS, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] & places) != 0
    return bits.view(len(packed), -1)[:, :in_features]
