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
from .lazy import LazyProduct
from .lowrank_linear import own
from .table_form import Bag, TableForm, refuse_bag_arguments, sizes_of_table, table_options

OPS = ("mult", "add", "concat")


class QuotientRemainderEmbedding(TableForm):
    """Two nn.Embedding children, so that sparse gradients, hooks and optimizers work as before.

    Tensors: `quotient.weight` (⌈V/m⌉, D) and `remainder.weight` (m, D); for `concat` they are
    D − width and `width` columns wide. The row of `padding_idx` is zero and has no gradient; bags
    leave it out. `scale_grad_by_freq` counts how often a row of either table was read.
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

    @property
    def weight(self) -> Tensor:
        """The dense table (V, D), computed when used, for code that reads `.weight`."""
        shape = (self.num_embeddings, self.embedding_dim)
        return LazyProduct.of(shape, floating(self), self.dense_weight)

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Ids as for the replaced layer -> (..., D); offsets and weights are for bags."""
        rows = self.quotients_of(input)
        vectors = self._combined(self.quotient(rows), self.remainder(input % self.remainders))
        if self.bag is not None:
            return self.bag.pool(vectors, input, offsets, per_sample_weights, self.padding_idx)
        if offsets is not None or per_sample_weights is not None:
            refuse_bag_arguments()
        if self.padding_idx is None:
            return vectors
        return vectors.masked_fill((input == self.padding_idx).unsqueeze(-1), 0)

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
        whole = self._combined(rows, others[ids % self.remainders])
        if self.padding_idx is None:
            return whole
        return whole.masked_fill((ids == self.padding_idx).unsqueeze(-1), 0)

    def options(self) -> dict[str, Any]:
        shared = table_options(self.quotient)
        padding = {} if self.padding_idx is None else {"padding_idx": self.padding_idx}
        return {**padding, **shared, **({} if self.bag is None else self.bag.options())}

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
