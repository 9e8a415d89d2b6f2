"""What forms of nn.Embedding and nn.EmbeddingBag share: their options, and bags of vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from ..errors import LowrankError
from .form import INSTEAD, Form, floating
from .lazy import LazyProduct

MODES = ("sum", "mean", "max")
Table = nn.Embedding | nn.EmbeddingBag


@dataclass(frozen=True)
class Bag:
    """How a bag pools vectors that are computed for every id by itself.

    What is not linear in an id's vector, such as a product of two rows or a maximum, must not be
    pooled before it is whole: the sum of products is no product of sums.
    """

    mode: str
    include_last_offset: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise LowrankError(
                f"mode of a bag must be one of {', '.join(MODES)}, got {self.mode!r}"
            )

    @classmethod
    def of(cls, options: dict[str, Any]) -> Bag | None:
        """From those of `table_options` that are a bag's; None without any.

        Raises:
            TypeError: there are others, or no mode.
        """
        return cls(**options) if options else None

    def options(self) -> dict[str, Any]:
        """As in `table_options`."""
        last = {"include_last_offset": True} if self.include_last_offset else {}
        return {"mode": self.mode, **last}

    def pool(
        self,
        vectors: Tensor,
        ids: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        padding_idx: int | None,
    ) -> Tensor:
        """The bags (B, D), as nn.EmbeddingBag pools rows.

        Args:
            vectors: of every id, (*ids.shape, D).
            ids, offsets, per_sample_weights: as for nn.EmbeddingBag; ids equal to `padding_idx`
                are left out.

        Raises:
            LowrankError: torch.fx traces it, which knows no number of ids.
        """
        if isinstance(ids, torch.fx.Proxy):
            raise LowrankError(f"torch.fx cannot trace a bag of factored rows: {INSTEAD}")
        rows = vectors.reshape(-1, vectors.shape[-1])
        place = torch.arange(len(rows), dtype=ids.dtype, device=ids.device).view(ids.shape)
        left_out = None
        if padding_idx is not None:  # a row of its own, so that no shape depends on the ids
            left_out = len(rows)
            place = place.masked_fill(ids == padding_idx, left_out)
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        pooled: Tensor = embedding_bag(
            place, rows, offsets, mode=self.mode, per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset, padding_idx=left_out,
        )  # fmt: skip
        return pooled


class TableForm(Form):
    """A form of an nn.Embedding, or of an nn.EmbeddingBag, whose arguments its `forward` takes."""

    KIND = "embedding"
    WORDS: ClassVar[frozenset[str]] = frozenset({"mode"})
    num_embeddings: int
    embedding_dim: int

    @property
    def weight(self) -> Tensor:
        """The dense table (V, D), computed when used, for code that reads `.weight`."""
        shape = (self.num_embeddings, self.embedding_dim)
        return LazyProduct.of(shape, self.stored(), self.dense_weight)

    def stored(self) -> Tensor:
        """A tensor with the dtype and device of the table."""
        return floating(self)

    def options(self) -> dict[str, Any]:
        """The options of the replaced layer, as in `table_options`."""
        raise NotImplementedError

    def dense(self, weight: nn.Parameter) -> Table:
        """The replaced layer, with all its options and this weight (V, D)."""
        options = self.options()
        kind = nn.EmbeddingBag if "mode" in options else nn.Embedding
        table: Table = kind(*weight.shape, **{**options, "device": "meta"})
        table.weight = weight
        return table


class RowwiseForm(TableForm):
    """A form that computes every id's vector by itself. The row of `padding_idx` is zero and has no
    gradient; bags leave it out."""

    padding_idx: int | None
    bag: Bag | None

    def rows_of(self, ids: Tensor) -> Tensor:
        """The vectors (*ids.shape, D), whatever is padding.

        Raises:
            IndexError: an id is not in the table.
        """
        raise NotImplementedError

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Ids as for the replaced layer -> (..., D); offsets and weights are for bags."""
        vectors = self.rows_of(input)
        if self.bag is not None:
            return self.bag.pool(vectors, input, offsets, per_sample_weights, self.padding_idx)
        if offsets is not None or per_sample_weights is not None:
            refuse_bag_arguments()
        return self.without_padding(vectors, input)

    def without_padding(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """The vectors of `ids`, zero for padding."""
        if self.padding_idx is None:
            return vectors
        return vectors.masked_fill((ids == self.padding_idx).unsqueeze(-1), 0)

    def padding_and_bag(self) -> dict[str, Any]:
        """As in `table_options`."""
        padding = {} if self.padding_idx is None else {"padding_idx": self.padding_idx}
        return {**padding, **({} if self.bag is None else self.bag.options())}


def row_of(padding_idx: int | None, rows: int) -> int | None:
    """A padding index counted from the first row, as torch counts it.

    Raises:
        LowrankError: there is no such row.
    """
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise LowrankError(f"padding_idx must be a row of {rows}, got {padding_idx}")
    return padding_idx % rows


def refuse_bag_arguments() -> NoReturn:
    """Raises TypeError for a bag's arguments, where there is no bag."""
    raise TypeError("offsets and per_sample_weights are for an EmbeddingBag")


def sizes_of_table(table: nn.Module) -> dict[str, Any]:
    """V and D, under torch's names."""
    return {"num_embeddings": table.num_embeddings, "embedding_dim": table.embedding_dim}


def table_options(table: nn.Module) -> dict[str, Any]:
    """The options of an nn.Embedding or nn.EmbeddingBag that differ from the defaults (JSON)."""
    options = {
        "padding_idx": table.padding_idx,
        "sparse": table.sparse,
        "scale_grad_by_freq": table.scale_grad_by_freq,
    }
    kept: dict[str, Any] = {k: v for k, v in options.items() if v is not None and v is not False}
    if isinstance(table, nn.EmbeddingBag):
        kept["mode"] = table.mode
        kept |= {"include_last_offset": True} if table.include_last_offset else {}
    return kept
