"""A table whose rows are scaled by gates, one for every block of rows and every dimension.

While gates are trained the table is dense; `compacted` leaves out the dimensions that a block does
without, and multiplies the gates of the others into its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ...errors import LowrankError
from ...nn import BlockEmbedding, LowRankEmbedding
from ...nn.table_form import Bag, RowwiseForm, table_options


class GatedTable(RowwiseForm):
    """e'_i = α_{block of i} ⊙ e_i, in place of an nn.Embedding or nn.EmbeddingBag.

    `rows.weight` is the parameter of that layer; `gates` α (blocks, D) are one at first; `block`
    (V,) int32 is the block of every id.
    """

    block: Tensor

    def __init__(self, table: nn.Module, block: Tensor) -> None:
        super().__init__()
        weight: nn.Parameter = table.weight  # type: ignore[assignment]
        self.num_embeddings, self.embedding_dim = weight.shape
        options = table_options(table)
        bag = {key: options.pop(key) for key in Bag.__dataclass_fields__ if key in options}
        self.bag = Bag.of(bag)
        self.rows = nn.Embedding(*weight.shape, **{**options, "device": "meta"})
        self.rows.weight = weight
        self.padding_idx = self.rows.padding_idx
        self.gates = nn.Parameter(weight.new_ones(int(block.max()) + 1, self.embedding_dim))
        self.register_buffer("block", block.int())

    @property
    def lengths(self) -> list[int]:
        """How many rows every block has."""
        return torch.bincount(self.block, minlength=len(self.gates)).tolist()

    def rows_of(self, ids: Tensor) -> Tensor:
        vectors: Tensor = self.rows(ids)
        blocks = self.block.index_select(0, ids.flatten()).view(ids.shape)
        return vectors * embedding(blocks, self.gates)

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense table (V, D), computed in `dtype` (None: that of the rows)."""
        weight = self.rows.weight.to(dtype or self.rows.weight.dtype)
        whole = weight * self.gates.to(weight.dtype)[self.block.long()]
        return self.without_padding(whole, torch.arange(len(whole), device=whole.device))

    def options(self) -> dict[str, Any]:
        return {**table_options(self.rows), **self.padding_and_bag()}

    def sizes(self) -> Tensor:
        """(blocks, D) float64: the root of the mean square of |α e| in a block."""
        energy = self.dense_weight(torch.float64).detach().square()
        sums = energy.new_zeros(len(self.gates), self.embedding_dim)
        sums = sums.index_add(0, self.block.long(), energy)
        counts = torch.tensor(self.lengths, dtype=torch.float64, device=sums.device)
        return (sums / counts[:, None]).sqrt()


def halving_blocks(rows: int, blocks: int) -> Tensor:
    """The block of every place (rows,), int64: each is twice as long as the one before it.

    A table too short for so many has fewer.
    """
    blocks = max(1, min(blocks, (rows + 1).bit_length() - 1))
    places = torch.arange(rows, dtype=torch.float64)
    ends = torch.tensor([rows * (2**b - 1) / (2**blocks - 1) for b in range(1, blocks)])
    return torch.bucketize(places, ends.double().round(), right=True)


def widest(
    sizes: Mapping[str, Tensor], lengths: Mapping[str, Sequence[int]], limit: int
) -> dict[str, Tensor]:
    """Which dimension every block keeps, (blocks, D) bool by table: those of the largest sizes.

    Every table keeps one at least; one that would not fit is passed over, and a block whose rows
    and map would be no smaller than its rows of all dimensions keeps all.

    Args:
        sizes: (blocks, D) of every table.
        lengths: rows of every block.
        limit: numbers in all tables, maps included.

    Raises:
        LowrankError: not even one dimension of every table fits.
    """
    places = [
        (value, name, *divmod(at, table.shape[1]))
        for name, table in sizes.items()
        for at, value in enumerate(table.flatten().tolist())
    ]
    places.sort(key=lambda place: -place[0])
    first = {name: place for place in reversed(places) for name in place[1:2]}  # the largest
    kept = {name: torch.zeros_like(size, dtype=torch.bool) for name, size in sizes.items()}
    widths = {name: [0] * len(size) for name, size in sizes.items()}
    spent = 0
    for place in [*first.values(), *places]:
        _, name, block, dimension = place
        length, columns, width = lengths[name][block], sizes[name].shape[1], widths[name][block]
        more = block_params(length, width + 1, columns) - block_params(length, width, columns)
        if kept[name][block, dimension]:
            continue
        if spent + more <= limit:
            kept[name][block, dimension] = True
            widths[name][block], spent = width + 1, spent + more
        elif place is first[name]:
            raise LowrankError(
                f"one dimension of {len(first)} tables takes more numbers than the {limit:,} that "
                "are to be kept: ask for a larger ratio, or exclude small tables"
            )
    for name, mask in kept.items():
        for block, (length, width) in enumerate(zip(lengths[name], widths[name], strict=True)):
            whole = length * mask.shape[1]
            if block_params(length, width, mask.shape[1]) == whole:
                mask[block] = True
    return kept


def block_params(length: int, width: int, columns: int) -> int:
    """Numbers in a block and its map, or in its rows of all columns, if those are fewer."""
    return min(width * (length + columns), length * columns)


def compacted(table: GatedTable, kept: Tensor) -> nn.Module:
    """The table of the dimensions that are kept: an nn.Embedding or nn.EmbeddingBag where that is
    all of them, a LowRankEmbedding where all blocks keep the same, and else a BlockEmbedding.

    Args:
        kept: (blocks, D) bool.
    """
    weight = table.dense_weight().detach()
    like = table.dense(nn.Parameter(weight, requires_grad=table.rows.weight.requires_grad))
    if bool(kept.all()):
        return like
    eye = torch.eye(table.embedding_dim, dtype=weight.dtype, device=weight.device)
    if bool((kept == kept[0]).all()):
        return LowRankEmbedding.from_factors(weight[:, kept[0]], eye[:, kept[0]], like)
    changes = (kept[1:] != kept[:-1]).any(1)
    group = torch.cat([changes.new_zeros(1), changes]).cumsum(0)  # neighbours that keep the same
    groups = group[table.block.long()]
    sequence = groups.argsort(stable=True)
    in_order = bool((groups.diff() >= 0).all())
    rows: list[Tensor] = []
    ups: list[Tensor | None] = []
    for number in range(int(group[-1]) + 1):
        mask = kept[int((group == number).nonzero()[0])]
        rows.append(weight[sequence[groups[sequence] == number]][:, mask])
        ups.append(eye[:, mask] if 0 < int(mask.sum()) < len(eye) else None)
    return BlockEmbedding.from_blocks(rows, ups, None if in_order else sequence.argsort(), like)
