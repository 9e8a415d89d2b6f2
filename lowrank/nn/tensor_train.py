"""A table as a tensor train: three small cores, of which every id reads a slice (arXiv 1901.10787).

The id is written in three digits i = (i₁ i₂ i₃), the column too, D = d₁d₂d₃, and the row is

    e_i = G₁[i₁] · G₂[i₂] · G₃[i₃],   (d₁, R₁) · (R₁, d₂ R₂) · (R₂, d₃),

two products of small matrices: the table is never built. R₁n₁d₁ + R₁n₂d₂R₂ + R₂n₃d₃ numbers stand
in the place of V · D. FBTT-Embedding and tt-pytorch have one rank for both, custom kernels and
caches; here it is plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .. import linalg
from ..errors import LowrankError
from ..types import Cost, Size
from .children import table_weight
from .form import floating
from .lowrank_linear import own
from .table_form import Bag, RowwiseForm, row_of, sizes_of_table, table_options


class TensorTrainEmbedding(RowwiseForm):
    """Three nn.Embedding children, so that sparse gradients, hooks and optimizers work as before.

    Tensors: `first.weight` (n₁, d₁R₁), `middle.weight` (n₂, R₁d₂R₂) and `last.weight` (n₃, R₂d₃).
    `scale_grad_by_freq` counts how often a slice of any core was read.
    """

    STORAGE = "tensor-train"
    SIZE = ("left", "right")
    WORDS = frozenset({"mode"})

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        left: int,
        right: int,
        *,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            left, right: R₁ and R₂.
            rows: n₁, n₂, n₃, whose product is V or more; None: near its cube root.
            columns: d₁, d₂, d₃, whose product is D; None: as even as they can be.
            options: of the replaced layer, see `table_options`.

        Raises:
            LowrankError: unknown mode, or sizes that do not go together.
        """
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.digits = tuple(linalg.row_sides(num_embeddings) if rows is None else rows)
        self.columns = tuple(linalg.column_sides(embedding_dim) if columns is None else columns)
        self.left, self.right = left, right
        _check(num_embeddings, embedding_dim, self.digits, self.columns, (left, right))
        self.padding_idx = row_of(options.pop("padding_idx", None), num_embeddings)
        how = {key: options.pop(key, False) for key in ("sparse", "scale_grad_by_freq")}
        self.bag = Bag.of(options)
        place: dict[str, Any] = {**how, "device": device, "dtype": dtype}
        (n1, n2, n3), (d1, d2, d3) = self.digits, self.columns
        self.first = nn.Embedding(n1, d1 * left, **place)
        self.middle = nn.Embedding(n2, left * d2 * right, **place)
        self.last = nn.Embedding(n3, right * d3, **place)

    @classmethod
    def from_cores(cls, first: Tensor, middle: Tensor, last: Tensor, like: nn.Module) -> Self:
        """The layer of G₁ (n₁, d₁, R₁), G₂ (n₂, R₁, d₂, R₂) and G₃ (n₃, R₂, d₃), which it copies.

        Args:
            like: the nn.Embedding or nn.EmbeddingBag whose sizes and options it keeps.

        Raises:
            LowrankError: the cores do not go together, or not with its sizes.
        """
        (n1, d1, left), (n2, *_, d2, right), (n3, *_, d3) = first.shape, middle.shape, last.shape
        table = cls.empty(
            **sizes_of_table(like), left=left, right=right, rows=[n1, n2, n3],
            columns=[d1, d2, d3], **table_options(like),
        )  # fmt: skip
        wanted = (n1, d1, left), (n2, left, d2, right), (n3, right, d3)
        for child, core, shape in zip(table.children(), (first, middle, last), wanted, strict=True):
            if tuple(core.shape) != shape:
                raise LowrankError(f"expected a core {shape}, got {tuple(core.shape)}")
            child.weight = own(core.flatten(1))
        return table

    @classmethod
    def empty(cls, *, num_embeddings: int, embedding_dim: int, **spec: Any) -> Self:
        """`spec` as given by `spec()`; unknown entries raise a TypeError."""
        return cls(num_embeddings, embedding_dim, **spec, device="meta")

    @classmethod
    def size_cost(cls, shape: Sequence[int], size: Size, *, itemsize: int, heads: int = 0) -> Cost:
        sides = linalg.row_sides(shape[0]), linalg.column_sides(shape[1])
        return tensor_train_cost(*sides, *size, itemsize=itemsize)

    def rows_of(self, ids: Tensor) -> Tensor:
        (_, d2, d3), (_, n2, n3) = self.columns, self.digits
        leading = torch.div(ids, n2 * n3, rounding_mode="floor")
        if self.num_embeddings < math.prod(self.digits):  # rows that only fill up
            leading = leading.masked_fill(ids >= self.num_embeddings, self.digits[0])
        middle = torch.div(ids, n3, rounding_mode="floor") % n2
        first = self.first(leading).unflatten(-1, (-1, self.left))  # (..., d₁, R₁)
        second = self.middle(middle).unflatten(-1, (self.left, d2 * self.right))
        third = self.last(ids % n3).unflatten(-1, (self.right, d3))
        both = (first @ second).flatten(-2).unflatten(-1, (-1, self.right))  # (..., d₁d₂, R₂)
        rows: Tensor = (both @ third).flatten(-2)
        return rows

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense table (V, D), computed in `dtype` (None: that of the cores)."""
        children = zip((self.first, self.middle, self.last), self.digits, strict=True)
        cores = [table_weight(child, count) for child, count in children]
        one, two, three = (core.to(dtype or core.dtype) for core in cores)
        whole = linalg.tt_table(
            one.unflatten(1, (-1, self.left)),
            two.unflatten(1, (self.left, -1, self.right)),
            three.unflatten(1, (self.right, -1)),
        )[: self.num_embeddings]
        return self.without_padding(whole, torch.arange(len(whole), device=whole.device))

    def options(self) -> dict[str, Any]:
        return {**table_options(self.first), **self.padding_and_bag()}

    def spec(self) -> dict[str, Any]:
        return {
            "num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim,
            "left": self.left, "right": self.right,
            "rows": [*self.digits], "columns": [*self.columns], **self.options(),
        }  # fmt: skip

    def cost(self) -> Cost:
        """MACs are per output vector."""
        itemsize = floating(self).dtype.itemsize
        return tensor_train_cost(
            self.digits, self.columns, self.left, self.right, itemsize=itemsize
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, ranks=({self.left}, {self.right})"


def _check(
    rows: int, columns: int, digits: Sequence[int], parts: Sequence[int], ranks: Sequence[int]
) -> None:
    """Raises LowrankError for sizes that no tensor train of this table has."""
    three = len(digits) == len(parts) == 3
    if not three or math.prod(digits) < rows or math.prod(parts) != columns:
        raise LowrankError(
            f"a table ({rows}, {columns}) takes three numbers of rows, whose product is at least "
            f"{rows}, and three of columns, whose product is {columns}, got {digits} and {parts}"
        )
    if min(ranks) < 1:
        raise LowrankError(f"both ranks must be at least 1, got {tuple(ranks)}")


def tensor_train_cost(
    rows: Sequence[int], columns: Sequence[int], left: int, right: int, *, itemsize: int
) -> Cost:
    """Cost of cores of ranks `left` and `right`; products are per output vector.

    Args:
        rows: n₁, n₂, n₃.
        columns: d₁, d₂, d₃.
        itemsize: bytes of one number.
    """
    (n1, n2, n3), (d1, d2, d3) = rows, columns
    params = n1 * d1 * left + n2 * left * d2 * right + n3 * right * d3
    return Cost(params, params * itemsize, d1 * left * d2 * right + d1 * d2 * right * d3)
