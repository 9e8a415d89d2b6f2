"""Further readers of one factored token table: they hold it, but store nothing of it.

The table is registered and saved where its embedding stands. A reader keeps it outside `_modules`,
so that its tensors have one name: no file holds them twice, and `.to()` reaches them once. A deep
copy of the whole model ties the copies to each other.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import LowrankError
from ..types import Cost
from .form import Form
from .lowrank_embedding import LowRankEmbedding


class _Reader(Form):
    """What both readers share: the table, by reference."""

    READS = "factored embedding"

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank

    @property
    def owner(self) -> LowRankEmbedding:
        """The table that it reads.

        Raises:
            LowrankError: it was built empty and never bound.
        """
        owner = self.__dict__.get("_owner")
        if not isinstance(owner, LowRankEmbedding):
            raise LowrankError(f"this {type(self).__name__} was never bound to its embedding")
        return owner

    def bind(self, owner: nn.Module) -> Self:
        """Read this table from now on.

        Raises:
            LowrankError: it is no factored table, or has other sizes.
        """
        sizes = (self.num_embeddings, self.embedding_dim, self.rank)
        theirs = None
        if isinstance(owner, LowRankEmbedding):
            theirs = (owner.num_embeddings, owner.embedding_dim, owner.rank)
        if theirs != sizes:
            raise LowrankError(
                f"a {type(self).__name__} of (vocabulary, width, rank) {sizes} cannot share "
                f"{type(owner).__name__} of {theirs}"
            )
        self.__dict__["_owner"] = owner  # not by setattr, which would register it
        return self

    @property
    def weight(self) -> Tensor:
        """The dense table (V, D), computed anew."""
        return self.dense_weight()

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(V, D), multiplied in `dtype` (None: that of the factors)."""
        return self.owner.dense_weight(dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, shared"


class TiedEmbedding(_Reader):
    """A second nn.Embedding that had the same weight."""

    KIND = "embedding"

    @classmethod
    def of(cls, owner: LowRankEmbedding) -> Self:
        return cls(owner.num_embeddings, owner.embedding_dim, owner.rank).bind(owner)

    @classmethod
    def empty(cls, *, num_embeddings: int, embedding_dim: int, rank: int) -> Self:
        return cls(num_embeddings, embedding_dim, rank)

    @property
    def padding_idx(self) -> int | None:
        return self.owner.padding_idx

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the table itself."""
        return cast(Tensor, self.owner(*args, **kwargs))

    def spec(self) -> dict[str, Any]:
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return {**sizes, "rank": self.rank}

    def cost(self) -> Cost:
        return Cost(0, 0, self.rank * self.embedding_dim)


class TiedHead(_Reader):
    """The output head of a tied pair: logits = rows · (upᵀ h) + bias; only the bias is its own."""

    bias: nn.Parameter | None

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int) -> None:
        super().__init__(num_embeddings, embedding_dim, rank)
        self.register_parameter("bias", None)

    @classmethod
    def of(cls, owner: LowRankEmbedding, bias: nn.Parameter | None = None) -> Self:
        """`bias` (V,) is kept as the object that it is: others may hold it too."""
        head = cls(owner.num_embeddings, owner.embedding_dim, owner.rank).bind(owner)
        head.bias = bias
        return head

    @classmethod
    def empty(cls, *, num_embeddings: int, embedding_dim: int, rank: int, bias: bool) -> Self:
        head = cls(num_embeddings, embedding_dim, rank)
        if bias:
            head.bias = nn.Parameter(torch.empty(num_embeddings, device="meta"))
        return head

    @property
    def in_features(self) -> int:
        return self.embedding_dim

    @property
    def out_features(self) -> int:
        return self.num_embeddings

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., V)."""
        inner = linear(x, self.owner.up.weight.T)  # (..., rank)
        return linear(inner, self.owner.rows.weight, self.bias)

    def spec(self) -> dict[str, Any]:
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return {**sizes, "rank": self.rank, "bias": self.bias is not None}

    def cost(self) -> Cost:
        return Cost(0, 0, self.rank * (self.num_embeddings + self.embedding_dim))
