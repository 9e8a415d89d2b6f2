"""y = up(down(x)) with the `down` of another layer: one basis for layers that read one tensor.

Basis Sharing (arXiv 2410.03765) shares it across blocks; here it is shared by layers that read the
same tensor (q, k and v; gate and up), so that the first product is computed once, as FlashSVD does
by packing. `down` is registered and stored in the first of them only.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..types import Cost
from .children import linear_weight, refuse_shards
from .form import LinearForm
from .lowrank_linear import LowRankLinear, own


class SharedLowRankLinear(LinearForm):
    """A layer that holds its owner outside `_modules`, so that `down` is saved and moved only once.

    Tensors: `up.weight` (out, rank), `up.bias` (out,). A deep copy of the model binds the copies to
    each other.
    """

    STORAGE = "shared"
    READS = "factored layer"
    NESTED = True

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
        """The layer of `up` and `bias`, which it copies, with the `down` of `owner`."""
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
        """Share the `down` of `owner` from now on.

        Raises:
            LowrankError: it is not a LowRankLinear, or of another width or rank.
        """
        sizes, owner_sizes = (self.in_features, self.rank), None
        if isinstance(owner, LowRankLinear):
            owner_sizes = (owner.in_features, owner.rank)
        if owner_sizes != sizes:
            raise LowrankError(
                f"a {type(self).__name__} of (in, rank) {sizes} cannot share "
                f"{type(owner).__name__} of {owner_sizes}"
            )
        previous = self.__dict__.get("_owner")
        if previous is not None:
            previous.last_product().readers -= 1
        self.__dict__["_owner"] = owner  # not by setattr, which would register it
        self.owner.last_product().readers += 1
        return self

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in) -> (..., out)."""
        refuse_shards(self.down, "two layers of one basis")
        return cast(Tensor, self.up(self.owner.shared_product(input)))

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight (out, in), computed in `dtype` (None: that of the factors)."""
        up, down = linear_weight(self.up), linear_weight(self.down)
        dtype = dtype or up.dtype
        return up.to(dtype) @ down.to(dtype)

    def leading(self, rank: int, owner: nn.Module | None = None) -> Self:
        layer = self.from_factors(cast(LowRankLinear, owner), self.up.weight[:, :rank], None)
        layer.up.bias = self.up.bias
        return layer

    def spec(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, "rank": self.rank, "bias": self.up.bias is not None}

    def cost(self) -> Cost:
        """Cost without `down` and its product, which count for its owner."""
        return shared_cost(self.out_features, self.rank, self.up.weight.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, shared down"


def shared_cost(out_features: int, rank: int, dtype: torch.dtype) -> Cost:
    """Cost of a layer that shares its `down`: rank · out numbers and as many MACs per token."""
    params = rank * out_features
    return Cost(params=params, bytes=params * dtype.itemsize, macs=params)
