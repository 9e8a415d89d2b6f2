"""y = up(down(x)) with the `down` of another layer: one basis for layers that read one tensor.

Basis Sharing (arXiv 2410.03765) shares it across blocks; here those share it that read the same
tensor (q, k and v; gate and up), so that the first product is computed once, as FlashSVD does by
packing. `down` is registered and stored in the first of them alone.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..types import Cost
from .form import LinearForm
from .lowrank_linear import LowRankLinear, own


class SharedLowRankLinear(LinearForm):
    """It holds the owner outside `_modules`: no file has `down` twice, and `.to()` reaches it once.

    Tensors: `up.weight` (out, rank), `up.bias` (out,). A deep copy of the whole model binds the
    copies to each other.
    """

    STORAGE = "shared"
    READS = "factored layer"

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
        self.in_features = in_features
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(cls, owner: LowRankLinear, up: Tensor, bias: Tensor | None) -> Self:
        """A layer that reads the `down` of `owner` and owns contiguous copies of `up`, `bias`."""
        layer = cls.empty(
            in_features=owner.in_features,
            out_features=up.shape[0],
            rank=up.shape[1],
            bias=bias is not None,
        )
        layer.up.weight = own(up)
        if bias is not None:
            layer.up.bias = own(bias)
        return layer.bind(owner)

    @classmethod
    def empty(cls, *, in_features: int, out_features: int, rank: int, bias: bool) -> Self:
        return cls(in_features, out_features, rank, bias=bias, device="meta")

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.up.in_features

    @property
    def owner(self) -> LowRankLinear:
        """The layer whose `down` it shares.

        Raises:
            LowrankError: it was built empty and never bound.
        """
        owner = self.__dict__.get("_owner")
        if not isinstance(owner, LowRankLinear):
            raise LowrankError(f"this {type(self).__name__} was never bound to the owner of `down`")
        return owner

    @property
    def down(self) -> nn.Linear:
        return self.owner.down

    def bind(self, owner: nn.Module) -> Self:
        """Share the `down` of this layer from now on.

        Raises:
            LowrankError: it is no LowRankLinear, or of another width or rank.
        """
        sizes, theirs = (self.in_features, self.rank), None
        if isinstance(owner, LowRankLinear):
            theirs = (owner.in_features, owner.rank)
        if theirs != sizes:
            raise LowrankError(
                f"a {type(self).__name__} of (in, rank) {sizes} cannot share "
                f"{type(owner).__name__} of {theirs}"
            )
        before = self.__dict__.get("_owner")
        if before is not None:
            before.last_product().readers -= 1
        self.__dict__["_owner"] = owner  # not by setattr, which would register it
        self.owner.last_product().readers += 1
        return self

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return cast(Tensor, self.up(self.owner.shared_product(x)))

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in), multiplied in `dtype` (None: that of the factors)."""
        dtype = dtype or self.up.weight.dtype
        return self.up.weight.to(dtype) @ self.down.weight.to(dtype)

    def spec(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, "rank": self.rank, "bias": self.up.bias is not None}

    def cost(self) -> Cost:
        """Of what is its own: `down` and its product count where they are stored."""
        return shared_cost(self.out_features, self.rank, self.up.weight.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, shared down"


def shared_cost(out_features: int, rank: int, dtype: torch.dtype) -> Cost:
    """Cost of a layer that shares its `down`: rank · out numbers and as many products per token."""
    params = rank * out_features
    return Cost(params=params, bytes=params * dtype.itemsize, macs=params)
