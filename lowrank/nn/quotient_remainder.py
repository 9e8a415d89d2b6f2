"""Rows from two small tables, by quotient and remainder of their ids (arXiv 1909.02107).

e_i = Q[i // m] ∘ R[i mod m], with ∘ a product, a sum, or one after the other: ⌈V/m⌉ + m rows in the
place of V, and every id has a row of its own. DLRM's code pools a bag in each of the tables and
combines the sums (facebookresearch/dlrm#366), which is another function where a bag holds several
ids; here ids are combined first and pooled then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import LowrankError, unknown
from ..types import Cost, Size
from .children import table_weight
from .form import floating
from .lowrank_linear import own
from .table_form import Bag, RowwiseForm, row_of, sizes_of_table, table_options

OPS = ("mult", "add", "concat")


class QuotientRemainderEmbedding(RowwiseForm):
    """Two nn.Embedding children, so that sparse gradients, hooks and optimizers work as before.

    Tensors: `quotient.weight` (⌈V/m⌉, D) and `remainder.weight` (m, D); for `concat` they are
    D − width and `width` columns wide. `scale_grad_by_freq` counts how often a row of either table
    was read.
    """

    STORAGE = "quotient-remainder"
    SIZE = ("remainders", "width")
    WORDS = frozenset({"mode", "op"})

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        remainders: int,
        *,
        op: str = "mult",
        width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            remainders: m.
            op: "mult", "add" or "concat".
            width: columns of R: all of them, but for "concat", whose default is half.
            options: of the replaced layer, see `table_options`.

        Raises:
            LowrankError: unknown op or mode, or sizes that do not go together.
        """
        super().__init__()
        if op not in OPS:
            raise unknown("op", str(op), OPS)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.remainders, self.op = remainders, op
        split = op == "concat"
        self.width = (embedding_dim // 2 if split else embedding_dim) if width is None else width
        check_sizes(self.num_embeddings, self.embedding_dim, remainders, self.width, op)
        self.padding_idx = row_of(options.pop("padding_idx", None), num_embeddings)
        how = {key: options.pop(key, False) for key in ("sparse", "scale_grad_by_freq")}
        self.bag = Bag.of(options)
        quotients, left = -(-num_embeddings // remainders), embedding_dim - self.width * split
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.quotient = nn.Embedding(quotients, left, **how, **place)
        self.remainder = nn.Embedding(remainders, self.width, **how, **place)

    @classmethod
    def from_tables(cls, quotient: Tensor, remainder: Tensor, like: nn.Module, op: str) -> Self:
        """The layer of Q (⌈V/m⌉, ·) and R (m, ·), which it copies.

        Args:
            like: the nn.Embedding or nn.EmbeddingBag whose sizes and options it keeps.
        """
        table = cls.empty(
            **sizes_of_table(like), remainders=len(remainder), width=remainder.shape[1], op=op,
            **table_options(like),
        )  # fmt: skip
        for child, given in ((table.quotient, quotient), (table.remainder, remainder)):
            wanted, got = tuple(child.weight.shape), tuple(given.shape)
            if wanted != got:
                raise LowrankError(f"expected a table {wanted}, got {got}")
            child.weight = own(given)
        return table

    @classmethod
    def empty(
        cls, *, num_embeddings: int, embedding_dim: int, remainders: int, **spec: Any
    ) -> Self:
        """`spec` as given by `spec()`; unknown entries raise a TypeError."""
        return cls(num_embeddings, embedding_dim, remainders, **spec, device="meta")

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        return quotient_remainder_cost(*shape, *size, itemsize=itemsize)

    def rows_of(self, ids: Tensor) -> Tensor:
        rows = self.quotient(self.quotients_of(ids))
        return self._combined(rows, self.remainder(ids % self.remainders))

    def quotients_of(self, ids: Tensor) -> Tensor:
        """ids // m; one that is too large for every table where the id is."""
        quotients = torch.div(ids, self.remainders, rounding_mode="floor")
        if self.num_embeddings % self.remainders:  # else the last row would take more ids
            beyond = self.quotient.num_embeddings
            quotients = quotients.masked_fill(ids >= self.num_embeddings, beyond)
        return quotients

    def _combined(self, quotient: Tensor, remainder: Tensor) -> Tensor:
        if self.op == "mult":
            return quotient * remainder
        return quotient + remainder if self.op == "add" else torch.cat([quotient, remainder], -1)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense table (V, D), computed in `dtype` (None: that of the tables)."""
        quotient = table_weight(self.quotient, self.quotient.num_embeddings)
        remainder = table_weight(self.remainder, self.remainders)
        dtype = dtype or quotient.dtype
        ids = torch.arange(self.num_embeddings, device=quotient.device)
        rows, others = quotient.to(dtype)[self.quotients_of(ids)], remainder.to(dtype)
        return self.without_padding(self._combined(rows, others[ids % self.remainders]), ids)

    def options(self) -> dict[str, Any]:
        return {**table_options(self.quotient), **self.padding_and_bag()}

    def spec(self) -> dict[str, Any]:
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        own_sizes = {"remainders": self.remainders, "width": self.width, "op": self.op}
        return {**sizes, **own_sizes, **self.options()}

    def cost(self) -> Cost:
        """Cost of both tables; a lookup takes no products of matrices."""
        shape, itemsize = (self.num_embeddings, self.embedding_dim), floating(self).dtype.itemsize
        return quotient_remainder_cost(*shape, self.remainders, self.width, itemsize=itemsize)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, op={self.op!r}"


def check_sizes(rows: int, columns: int, remainders: int, width: int, op: str) -> None:
    """Raises LowrankError for sizes that no two tables have."""
    if not 1 <= remainders <= rows:
        raise LowrankError(f"remainders must be in [1, {rows}] for {rows} rows, got {remainders}")
    fits = 1 <= width < columns if op == "concat" else width == columns
    if not fits:
        wanted = f"below {columns}" if op == "concat" else f"{columns}, all columns"
        raise LowrankError(f"width must be {wanted} for op {op!r}, got {width}")


def quotient_remainder_cost(
    rows: int, columns: int, remainders: int, width: int, *, itemsize: int
) -> Cost:
    """Cost of two tables for one of (rows, columns); of sizes that there are not, the dense one's.

    Args:
        width: of R; below `columns`, Q has the other ones.
        itemsize: bytes of one number.
    """
    params = rows * columns
    if 1 <= remainders <= rows and 1 <= width <= columns:
        left = columns if width == columns else columns - width
        params = -(-rows // remainders) * left + remainders * width
    return Cost(params, params * itemsize, 0)
