"""A low-rank token table: y = up(rows(ids)), for nn.Embedding and nn.EmbeddingBag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..types import Cost, Size
from .children import linear_weight, table_weight
from .lowrank_linear import own
from .table_form import Bag, Table, TableForm, refuse_bag_arguments, table_options


class LowRankEmbedding(TableForm):
    """Two torch children, so that sparse gradients, hooks and optimisers work as before.

    Tensors: `rows.weight` (num_embeddings, rank), `up.weight` (embedding_dim, rank). `rows` keeps
    padding_idx (no gradient, left out of bags), sparse, scale_grad_by_freq and a bag's options. A
    zero padding row stays zero in training; one that is not zero changes with `up`. Bags of mode
    "max" are pooled after the product, with which a maximum does not commute; others before it.
    """

    STORAGE = "factors"
    NESTED = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        padding_idx: int | None = None,
        mode: str | None = None,
        sparse: bool = False,
        scale_grad_by_freq: bool = False,
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        bag = None if mode is None else Bag(mode, include_last_offset)
        self.bag = bag if mode == "max" else None  # of vectors; the others are of rows
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        shared: dict[str, Any] = {
            "padding_idx": padding_idx, "sparse": sparse, "scale_grad_by_freq": scale_grad_by_freq,
        }  # fmt: skip
        self.rows: Table
        if bag is None or self.bag is not None:
            self.rows = nn.Embedding(num_embeddings, rank, **shared, **place)
        else:
            self.rows = nn.EmbeddingBag(num_embeddings, rank, **shared, **bag.options(), **place)
        self.up = nn.Linear(rank, embedding_dim, bias=False, **place)

    @classmethod
    def from_factors(cls, rows: Tensor, up: Tensor, like: nn.Module) -> Self:
        """The table of `rows` (V, rank) and `up` (D, rank), which it copies.

        Args:
            like: the nn.Embedding or nn.EmbeddingBag whose options it keeps.
        """
        table = cls.empty(
            num_embeddings=rows.shape[0], embedding_dim=up.shape[0], rank=rows.shape[1],
            **table_options(like),
        )  # fmt: skip
        table.rows.weight = own(rows)
        table.up.weight = own(up)
        return table

    @classmethod
    def empty(cls, *, num_embeddings: int, embedding_dim: int, rank: int, **options: Any) -> Self:
        """`options` as in `table_options`; unknown ones raise a TypeError."""
        return cls(num_embeddings, embedding_dim, rank, **options, device="meta")

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return lookup_cost(*shape, *size, itemsize=itemsize, heads=heads)

    @property
    def padding_idx(self) -> int | None:
        return self.rows.padding_idx

    @property
    def rank(self) -> int:
        return self.up.in_features

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Ids as for the replaced layer -> (..., D); offsets and weights are for bags."""
        if isinstance(self.rows, nn.EmbeddingBag):
            return cast(Tensor, self.up(self.rows(input, offsets, per_sample_weights)))
        vectors: Tensor = self.up(self.rows(input))
        if self.bag is not None:
            return self.bag.pool(vectors, input, offsets, per_sample_weights, self.padding_idx)
        if offsets is not None or per_sample_weights is not None:
            refuse_bag_arguments()
        return vectors

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense table (V, D), computed in `dtype` (None: that of the factors)."""
        up = linear_weight(self.up)
        dtype = dtype or up.dtype
        return table_weight(self.rows, self.num_embeddings).to(dtype) @ up.to(dtype).T

    def leading(self, rank: int, owner: nn.Module | None = None) -> Self:
        part = self.empty(
            num_embeddings=self.num_embeddings, embedding_dim=self.embedding_dim, rank=rank,
            **self.options(),
        )  # fmt: skip
        part.rows.weight = own(self.rows.weight[:, :rank])
        part.up.weight = own(self.up.weight[:, :rank])
        return part

    def options(self) -> dict[str, Any]:
        return {**table_options(self.rows), **({} if self.bag is None else self.bag.options())}

    def spec(self) -> dict[str, Any]:
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return {**sizes, "rank": self.rank, **self.options()}

    def cost(self) -> Cost:
        """MACs are per output vector; reading a row has none."""
        shape, itemsize = (self.num_embeddings, self.embedding_dim), self.up.weight.dtype.itemsize
        return lookup_cost(*shape, self.rank, itemsize=itemsize)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


def lookup_cost(rows: int, columns: int, rank: int, *, itemsize: int, heads: int = 0) -> Cost:
    """Cost of a factored table (V, D): rank · (V + D) numbers, stored once for all its readers.

    Args:
        itemsize: bytes of one number.
        heads: output heads tied to the table.
    """
    params = rank * (rows + columns)
    return Cost(params, params * itemsize, rank * columns + heads * params)
