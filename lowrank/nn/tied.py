"""Modules tied to a factored token table: they read it without storing it.

The table is registered and saved in its embedding. A tied module holds it outside `_modules`, so
that its tensors have one name and are saved and moved only once. A deep copy of the model ties the
copies to each other.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import LowrankError
from ..types import Cost
from .children import linear_weight, refuse_shards, table_weight
from .form import Form
from .lowrank_embedding import LowRankEmbedding


class _Reader(Form):
    """The base of both tied modules: the table, by reference."""

    READS = "factored embedding"
    NESTED = True

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
        """Read the table of `owner` from now on.

        Raises:
            LowrankError: it is not a factored table, or has other sizes.
        """
        sizes = (self.num_embeddings, self.embedding_dim, self.rank)
        owner_sizes = None
        if isinstance(owner, LowRankEmbedding):
            owner_sizes = (owner.num_embeddings, owner.embedding_dim, owner.rank)
        if owner_sizes != sizes:
            raise LowrankError(
                f"a {type(self).__name__} of (vocabulary, width, rank) {sizes} cannot share "
                f"{type(owner).__name__} of {owner_sizes}"
            )
        self.__dict__["_owner"] = owner  # not by setattr, which would register it
        return self

    @property
    def weight(self) -> Tensor:
        """The dense table (V, D), computed when used."""
        return self.owner.weight

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense table (V, D), computed in `dtype` (None: that of the factors)."""
        return self.owner.dense_weight(dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, shared"


class TiedEmbedding(_Reader):
    """A second embedding tied to the table."""

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

    def leading(self, rank: int, owner: nn.Module | None = None) -> Self:
        return self.of(cast(LowRankEmbedding, owner))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The owner's forward pass."""
        return cast(Tensor, self.owner(*args, **kwargs))

    def spec(self) -> dict[str, Any]:
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return {**sizes, "rank": self.rank}

    def cost(self) -> Cost:
        return Cost(0, 0, self.rank * self.embedding_dim)


class TiedHead(_Reader):
    """An output head tied to the table: logits = rows · (upᵀ h) + bias; it owns only the bias."""

    bias: nn.Parameter | None

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int) -> None:
        super().__init__(num_embeddings, embedding_dim, rank)
        self.register_parameter("bias", None)

    @classmethod
    def of(cls, owner: LowRankEmbedding, bias: nn.Parameter | None = None) -> Self:
        """The head of a table; `bias` (V,) is kept by reference, since others may hold it too."""
        head = cls(owner.num_embeddings, owner.embedding_dim, owner.rank).bind(owner)
        head.bias = bias
        return head

    @classmethod
    def empty(cls, *, num_embeddings: int, embedding_dim: int, rank: int, bias: bool) -> Self:
        head = cls(num_embeddings, embedding_dim, rank)
        if bias:
            head.bias = nn.Parameter(torch.empty(num_embeddings, device="meta"))
        return head

    def leading(self, rank: int, owner: nn.Module | None = None) -> Self:
        return self.of(cast(LowRankEmbedding, owner), self.bias)

    @property
    def in_features(self) -> int:
        return self.embedding_dim

    @property
    def out_features(self) -> int:
        return self.num_embeddings

    def forward(self, input: Tensor) -> Tensor:
        """input (..., D) -> (..., V)."""
        rows, up = self.owner.rows, self.owner.up
        refuse_shards(up, "the embedding and the head tied to it")
        inner = linear(input, linear_weight(up, input).T)  # (..., rank)
        return linear(inner, table_weight(rows, self.num_embeddings, inner), self.bias)

    def spec(self) -> dict[str, Any]:
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return {**sizes, "rank": self.rank, "bias": self.bias is not None}

    def cost(self) -> Cost:
        return Cost(0, 0, self.rank * (self.num_embeddings + self.embedding_dim))
