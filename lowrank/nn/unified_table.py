"""One hashed table for many features: every id reads several rows of it (arXiv 2305.12102).

e_f(i) = [T[h_f1(i)]; …; T[h_fL(i)]], h(i) = ((a i + b) mod p) mod M with p = 2³¹ − 1, and a and b
drawn for every feature and look-up. Two ids collide in all L rows about once in M^L. The hashes are
arithmetic on the seed, so that nothing of them is stored. T belongs to the first feature's module;
the others hold it outside `_modules`, as tied embeddings do.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..types import Cost
from .children import refuse_shards, table_weight
from .lowrank_linear import own
from .table_form import Bag, RowwiseForm, row_of, sizes_of_table, table_options

PRIME = 2**31 - 1
WORD = 2**64


class _Hashed(RowwiseForm):
    """What both modules share: the hashes of a feature, and look-ups in the owner's table."""

    SIZE = ("rows", "lookups")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rows: int,
        lookups: int,
        *,
        feature: int,
        seed: int,
        **options: Any,
    ) -> None:
        """
        Args:
            rows, lookups: M and L; a row of T has embedding_dim / L numbers.
            feature: its number, which chooses its hashes.
            options: of the replaced layer, see `table_options`.

        Raises:
            LowrankError: sizes that do not go together, or too many ids.
        """
        super().__init__()
        if min(rows, lookups) < 1 or embedding_dim % lookups:
            raise LowrankError(
                f"rows and lookups must be >= 1, and lookups divide the width {embedding_dim}, "
                f"got {rows} and {lookups}"
            )
        if num_embeddings >= PRIME:
            raise LowrankError(f"ids are hashed below {PRIME}, got {num_embeddings} of them")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.rows, self.lookups, self.feature, self.seed = rows, lookups, feature, seed
        self.padding_idx = row_of(options.pop("padding_idx", None), num_embeddings)
        flags = {key: options.pop(key, False) for key in ("sparse", "scale_grad_by_freq")}
        self.how = {key: True for key, value in flags.items() if value}
        self.bag = Bag.of(options)
        self.hashes = [hash_of(seed, feature, lookup) for lookup in range(lookups)]

    def table(self) -> nn.Embedding:
        """T (M, D/L), as a module."""
        raise NotImplementedError

    def hashed(self, ids: Tensor) -> Tensor:
        """The rows of T that ids read, (*ids.shape, L); M, which T does not have, for ids that the
        feature does not have."""
        ids = ids.long()
        rows = torch.stack([(ids * a + b) % PRIME % self.rows for a, b in self.hashes], -1)
        outside = (ids < 0) | (ids >= self.num_embeddings)
        return rows.masked_fill(outside.unsqueeze(-1), self.rows)

    def rows_of(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.table()(self.hashed(ids))).flatten(-2)

    def stored(self) -> Tensor:
        return table_weight(self.table(), self.rows)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The table (V, D) that it stands for, in `dtype` (None: that of T)."""
        table = table_weight(self.table(), self.rows)
        ids = torch.arange(self.num_embeddings, device=table.device)
        whole = table.to(dtype or table.dtype)[self.hashed(ids)].flatten(-2)
        return self.without_padding(whole, ids)

    def options(self) -> dict[str, Any]:
        return {**self.how, **self.padding_and_bag()}

    def spec(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim,
            "rows": self.rows, "lookups": self.lookups, "feature": self.feature, "seed": self.seed,
            **self.options(),
        }  # fmt: skip

    @classmethod
    def like(cls, dense: nn.Module, rows: int, lookups: int, *, feature: int, seed: int) -> Self:
        """Empty, on the meta device, in the place of an nn.Embedding or nn.EmbeddingBag."""
        return cls.empty(
            **sizes_of_table(dense), rows=rows, lookups=lookups, feature=feature, seed=seed,
            **table_options(dense),
        )  # fmt: skip

    @classmethod
    def empty(cls, **spec: Any) -> Self:
        """`spec` as given by `spec()`; unknown entries raise a TypeError."""
        return cls(**spec)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, lookups={self.lookups}"


class UnifiedEmbedding(_Hashed):
    """The first feature, which stores the table of all. Tensors: `shared.weight` (M, D/L)."""

    STORAGE = "unified"

    def __init__(
        self, num_embeddings: int, embedding_dim: int, rows: int, lookups: int, **spec: Any
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, rows, lookups, **spec)
        how: dict[str, Any] = {**self.how, "device": "meta"}
        self.shared = nn.Embedding(rows, embedding_dim // lookups, **how)

    def set_table(self, table: Tensor) -> Self:
        """Store T (M, D/L), which is copied."""
        wanted, got = tuple(self.shared.weight.shape), tuple(table.shape)
        if wanted != got:
            raise LowrankError(f"expected a table {wanted}, got {got}")
        self.shared.weight = own(table)
        return self

    def table(self) -> nn.Embedding:
        return self.shared

    def cost(self) -> Cost:
        weight = self.shared.weight
        return Cost(weight.numel(), weight.numel() * weight.dtype.itemsize, 0)


class UnifiedReader(_Hashed):
    """Any other feature; it stores nothing."""

    READS = "unified table"

    @property
    def owner(self) -> UnifiedEmbedding:
        """The module that stores the table.

        Raises:
            LowrankError: it was built empty and never bound.
        """
        owner = self.__dict__.get("_owner")
        if not isinstance(owner, UnifiedEmbedding):
            raise LowrankError(f"this {type(self).__name__} was never bound to its table")
        return owner

    def bind(self, owner: nn.Module) -> Self:
        """Read the table of `owner` from now on.

        Raises:
            LowrankError: it is no UnifiedEmbedding, or has a table of other sizes.
        """
        wanted, got = (self.rows, self.embedding_dim // self.lookups), None
        if isinstance(owner, UnifiedEmbedding):
            got = (owner.shared.num_embeddings, owner.shared.embedding_dim)
        if got != wanted:
            raise LowrankError(
                f"a {type(self).__name__} of a table {wanted} cannot share that of "
                f"{type(owner).__name__}, {got}"
            )
        self.__dict__["_owner"] = owner  # not by setattr, which would register it
        return self

    def table(self) -> nn.Embedding:
        shared = self.owner.shared
        refuse_shards(shared, "two features of one table")
        return shared

    def cost(self) -> Cost:
        """Nothing: the table counts for its owner."""
        return Cost(0, 0, 0)


def hash_of(seed: int, feature: int, lookup: int) -> tuple[int, int]:
    """(a, b) with 1 <= a < p and 0 <= b < p, from SplitMix64 of the three numbers."""
    state = 0
    for number in (seed, feature, lookup):
        state = _mixed(state ^ (number % WORD))
    return 1 + state % (PRIME - 1), _mixed(state) % PRIME


def _mixed(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) % WORD
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % WORD
    return state ^ (state >> 31)
