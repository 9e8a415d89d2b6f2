"""A table in blocks of rows, each as wide as it needs (mixed dimensions, arXiv 1909.11810).

Rows that are read often keep more numbers than rare ones: block b holds n_b rows of d_b numbers
and, where d_b is between 0 and D, its own map up to D. A block of width 0 stores nothing, and its
rows are zero. The policy "mixed-dimensions" does so between tables; here it is within one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..types import Cost
from .children import linear_weight, table_weight
from .form import floating
from .lowrank_linear import own
from .table_form import Bag, RowwiseForm, row_of, sizes_of_table, table_options


class BlockEmbedding(RowwiseForm):
    """Torch's own children, so that sparse gradients, hooks and optimizers work as before.

    Tensors: `rows.B.weight` (n_b, d_b) of every block B of width above 0, `up.B.weight` (D, d_b) of
    those below D, and `order` (V,) int32, the place of every id in the blocks, unless they hold the
    ids in order. All blocks are read for every id, so that no shape depends on ids: a sparse
    gradient holds a zero for the first row of the other blocks.
    """

    WORDS = frozenset({"mode"})

    order: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        lengths: Sequence[int],
        widths: Sequence[int],
        *,
        ordered: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            lengths: n_b, of sum V.
            widths: d_b, from 0 to D.
            ordered: whether ids have places of their own: `order`.
            options: of the replaced layer, see `table_options`.

        Raises:
            LowrankError: unknown mode, or sizes that do not go together.
        """
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.lengths, self.widths = tuple(lengths), tuple(widths)
        _check(num_embeddings, embedding_dim, self.lengths, self.widths)
        self.padding_idx = row_of(options.pop("padding_idx", None), num_embeddings)
        how = {key: options.pop(key, False) for key in ("sparse", "scale_grad_by_freq")}
        self.bag = Bag.of(options)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rows, self.up = nn.ModuleDict(), nn.ModuleDict()
        for block, (length, width) in enumerate(zip(self.lengths, self.widths, strict=True)):
            if width:
                self.rows[str(block)] = nn.Embedding(length, width, **how, **place)
            if 0 < width < embedding_dim:
                self.up[str(block)] = nn.Linear(width, embedding_dim, bias=False, **place)
        places = torch.arange(num_embeddings, dtype=torch.int32, device=device)
        self.register_buffer("order", places if ordered else None)

    @classmethod
    def from_blocks(
        cls,
        rows: Sequence[Tensor],
        ups: Sequence[Tensor | None],
        order: Tensor | None,
        like: nn.Module,
    ) -> Self:
        """The layer of these blocks, which it copies.

        Args:
            rows: of every block, (n_b, d_b).
            ups: (D, d_b); None of a block as wide as the table, and of an empty one.
            order: (V,), the place of every id; None: they are in order.
            like: the nn.Embedding or nn.EmbeddingBag whose sizes and options it keeps.
        """
        table = cls.empty(
            **sizes_of_table(like), lengths=[len(block) for block in rows],
            widths=[block.shape[1] for block in rows], ordered=order is not None,
            **table_options(like),
        )  # fmt: skip
        for block, child in table.rows.items():
            child.weight = own(rows[int(block)])
        for block, child in table.up.items():
            up = ups[int(block)]
            assert up is not None
            child.weight = own(up)
        if order is not None:
            table.order = order.int().clone()
        return table

    @classmethod
    def empty(cls, *, num_embeddings: int, embedding_dim: int, **spec: Any) -> Self:
        """`spec` as given by `spec()`; unknown entries raise a TypeError."""
        return cls(num_embeddings, embedding_dim, **spec, device="meta")

    def rows_of(self, ids: Tensor) -> Tensor:
        places, start = self.places_of(ids), 0
        outside = (places < 0) | (places >= self.num_embeddings)
        parts = []
        for block, length in enumerate(self.lengths):
            if str(block) in self.rows:
                here = (places >= start) & (places < start + length)
                local = (places - start).masked_fill(~here, 0).masked_fill(outside, length)
                vectors = self.rows[str(block)](local)
                if str(block) in self.up:
                    vectors = self.up[str(block)](vectors)
                parts.append(vectors.masked_fill(~here.unsqueeze(-1), 0))
            start += length
        whole: Tensor = sum(parts[1:], parts[0])
        return whole

    def places_of(self, ids: Tensor) -> Tensor:
        """Where ids stand in the blocks, one after the other."""
        if self.order is None:
            return ids
        return self.order.index_select(0, ids.flatten()).view(ids.shape)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense table (V, D), computed in `dtype` (None: that of the blocks)."""
        like = floating(self)
        dtype, parts = dtype or like.dtype, []
        for block, length in enumerate(self.lengths):
            if str(block) not in self.rows:
                parts.append(like.new_zeros(length, self.embedding_dim, dtype=dtype))
                continue
            rows = table_weight(self.rows[str(block)], length).to(dtype)
            if str(block) in self.up:
                rows = rows @ linear_weight(self.up[str(block)]).to(dtype).T
            parts.append(rows)
        whole = torch.cat(parts)
        ids = torch.arange(len(whole), device=whole.device)
        return self.without_padding(whole[self.places_of(ids)], ids)

    def fault(self) -> str:
        if self.order is None:
            return ""
        places = torch.arange(len(self.order), device=self.order.device)
        if torch.equal(self.order.long().sort().values, places):
            return ""
        return f"order must hold every number in [0, {len(places) - 1}] once"

    def options(self) -> dict[str, Any]:
        first = next(iter(self.rows.values()))
        return {**table_options(first), **self.padding_and_bag()}

    def spec(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim,
            "lengths": [*self.lengths], "widths": [*self.widths],
            "ordered": self.order is not None, **self.options(),
        }  # fmt: skip

    def cost(self) -> Cost:
        """MACs are per output vector: every block's map is computed for it."""
        itemsize = floating(self).dtype.itemsize
        params = blocks_params(self.lengths, self.widths, self.embedding_dim)
        index = 0 if self.order is None else torch.int32.itemsize * self.num_embeddings
        mapped = sum(width for width in self.widths if width < self.embedding_dim)
        return Cost(params, params * itemsize + index, mapped * self.embedding_dim)

    def extra_repr(self) -> str:
        sizes = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{sizes}, lengths={[*self.lengths]}, widths={[*self.widths]}"


def blocks_params(lengths: Sequence[int], widths: Sequence[int], columns: int) -> int:
    """Numbers in blocks of these lengths and widths, their maps to `columns` included."""
    maps = sum(width * columns for width in widths if width < columns)
    return maps + sum(n * d for n, d in zip(lengths, widths, strict=True))


def _check(rows: int, columns: int, lengths: Sequence[int], widths: Sequence[int]) -> None:
    """Raises LowrankError for blocks that no such table has."""
    if len(lengths) != len(widths) or sum(lengths) != rows or min(lengths, default=0) < 1:
        raise LowrankError(
            f"a table of {rows} rows takes blocks whose lengths are at least 1 and sum to that, "
            f"and a width for each, got {[*lengths]} and {[*widths]}"
        )
    if max(widths) > columns or min(widths) < 0 or not any(widths):
        raise LowrankError(f"widths must be in [0, {columns}] and not all 0, got {[*widths]}")
