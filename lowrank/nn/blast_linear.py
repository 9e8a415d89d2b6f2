"""Block linear layer with shared bases, W_ij = B_i diag(d_ij) C_j (BLAST, arXiv 2410.21262)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import linalg
from ..errors import LowrankError
from ..types import Cost, Size
from .form import LinearForm, check_traceable
from .lowrank_linear import own


class BlastLinear(LinearForm):
    """y_i = B_i Σ_j d_ij ∘ (C_j x_j), all blocks of a kind in one batched product.

    Tensors: `right` C (b, r, q), `mix` d (b, b, r), of block row i and block column j, `left` B
    (b, p, r), `bias` (out,); p = ⌈out / b⌉, q = ⌈in / b⌉. Where b does not divide a side, inputs
    are zero-padded and surplus outputs are dropped; the padding is stored too.
    """

    STORAGE = "blast"
    SIZE = ("blocks", "rank")
    REFITTED = True

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= blocks <= min(in_features, out_features) or rank < 1:
            raise LowrankError(
                f"expected blocks in [1, {min(in_features, out_features)}] and a rank >= 1 for a "
                f"layer of shape ({out_features}, {in_features}), got {blocks} and {rank}"
            )
        self.in_features, self.out_features = in_features, out_features
        rows, columns = -(-out_features // blocks), -(-in_features // blocks)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.right = nn.Parameter(torch.empty(blocks, rank, columns, **place))
        self.mix = nn.Parameter(torch.empty(blocks, blocks, rank, **place))
        self.left = nn.Parameter(torch.empty(blocks, rows, rank, **place))
        if not self.left.is_meta:
            nn.init.normal_(self.right, std=columns**-0.5)
            nn.init.normal_(self.mix, std=blocks**-0.5)
            nn.init.normal_(self.left, std=rank**-0.5)
        shift = nn.Parameter(torch.zeros(out_features, **place)) if bias else None
        self.register_parameter("bias", shift)

    @classmethod
    def from_factors(
        cls,
        left: Tensor,
        mix: Tensor,
        right: Tensor,
        bias: Tensor | None,
        *,
        shape: tuple[int, int],
    ) -> Self:
        """A layer that owns contiguous copies of B (b, p, r), d (b, b, r) and C (b, r, q).

        Args:
            shape: (out, in) without padding.

        Raises:
            LowrankError: the factors do not fit each other or the shape.
        """
        (out_features, in_features), (blocks, _, rank) = shape, mix.shape
        layer = cls.empty(
            in_features=in_features, out_features=out_features, blocks=blocks, rank=rank,
            bias=bias is not None,
        )  # fmt: skip
        for name, factor in (("left", left), ("mix", mix), ("right", right)):
            expected = tuple(getattr(layer, name).shape)
            if tuple(factor.shape) != expected:
                raise LowrankError(
                    f"expected {name} of shape {expected} for a layer of shape {shape} in {blocks} "
                    f"blocks of rank {rank}, got {tuple(factor.shape)}"
                )
            setattr(layer, name, own(factor))
        if bias is not None:
            layer.bias = own(bias)
        return layer

    @classmethod
    def empty(
        cls, *, in_features: int, out_features: int, blocks: int, rank: int, bias: bool
    ) -> Self:
        return cls(in_features, out_features, blocks, rank, bias=bias, device="meta")

    @property
    def blocks(self) -> int:
        return len(self.mix)

    @property
    def rank(self) -> int:
        return self.mix.shape[2]

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return blast_cost(*shape, *size, itemsize=itemsize)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        check_traceable(self, input)
        blocks, _, columns = self.right.shape
        rows = input.reshape(-1, self.in_features)
        rows = F.pad(rows, (0, blocks * columns - self.in_features))
        # Tokens last, so that each of the r small products of `mix` reads contiguous rows.
        inner = torch.bmm(self.right, rows.view(-1, blocks, columns).permute(1, 2, 0))  # (b, r, t)
        mixed = torch.bmm(self.mix.permute(2, 0, 1), inner.transpose(0, 1))  # (r, b, t)
        y = torch.bmm(self.left, mixed.transpose(0, 1))  # (b, p, t)
        y = y.flatten(0, 1)[: self.out_features].T.contiguous()
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors)."""
        dtype = dtype or self.left.dtype
        factors = (factor.to(dtype) for factor in (self.left, self.mix, self.right))
        whole = linalg.blast_product(*factors)
        return whole[: self.out_features, : self.in_features].contiguous()

    def spec(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "blocks": self.blocks,
            "rank": self.rank,
            "bias": self.bias is not None,
        }

    def cost(self) -> Cost:
        shape, itemsize = (self.out_features, self.in_features), self.left.dtype.itemsize
        return blast_cost(*shape, self.blocks, self.rank, itemsize=itemsize)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, blocks={self.blocks}, rank={self.rank}"


def blast_cost(
    out_features: int, in_features: int, blocks: int, rank: int, *, itemsize: int
) -> Cost:
    """rank · (out + in + blocks²) numbers and as many MACs, sides rounded up to whole blocks.

    Args:
        itemsize: bytes of one number.
    """
    sides = sum(-(-side // blocks) * blocks for side in (out_features, in_features))
    params = rank * (sides + blocks * blocks)
    return Cost(params, params * itemsize, params)
