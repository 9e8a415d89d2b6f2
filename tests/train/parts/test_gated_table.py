"""Tables under gates: their blocks, what a budget keeps of them, and the layer that remains."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.nn import BlockEmbedding, LowRankEmbedding
from lowrank.nn.block_embedding import blocks_params
from lowrank.train.parts.gated_table import GatedTable, compacted, halving_blocks, widest

IDS = torch.tensor([[1, 3, 5, 5, 2], [9, 0, 3, 10, 10]])
BLOCK = torch.tensor([1, 0, 2, 2, 1, 0, 2, 1, 2, 2, 1])


def gated(**options: Any) -> tuple[GatedTable, nn.Module]:
    """A table in three blocks, the first of which has two rows, and torch's layer of its rows."""
    torch.manual_seed(0)
    kind = nn.EmbeddingBag if "mode" in options else nn.Embedding
    dense = kind(11, 4, **options).double()
    table = GatedTable(dense, BLOCK)
    with torch.no_grad():
        table.gates.copy_(torch.rand(3, 4) + 0.5)
        like = kind(11, 4, **options).double()
        like.weight.copy_(dense.weight * table.gates[BLOCK])
    return table, like


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 3}, {"mode": "mean", "padding_idx": 0}, {"mode": "max"}],
)
def test_rows_are_scaled_by_their_blocks_gates(options: dict[str, Any]) -> None:
    table, like = gated(**options)
    assert table.lengths == [2, 4, 5]
    torch.testing.assert_close(table(IDS), like(IDS))
    table(IDS).sin().sum().backward()
    like(IDS).sin().sum().backward()
    slope = like.weight.grad
    torch.testing.assert_close(table.rows.weight.grad, slope * table.gates.detach()[BLOCK])
    wanted = torch.zeros(3, 4).double().index_add(0, BLOCK, slope * table.rows.weight.detach())
    torch.testing.assert_close(table.gates.grad, wanted)
    assert table.options() == options


def test_blocks_double_in_length() -> None:
    assert torch.bincount(halving_blocks(1023, 4)).tolist() == [68, 137, 272, 546]
    assert halving_blocks(7, 8).tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert halving_blocks(1, 8).tolist() == [0]
    assert halving_blocks(100, 1).tolist() == [0] * 100
    for rows, blocks in itertools.product((2, 3, 10, 31, 500), (2, 3, 8)):
        counts = torch.bincount(halving_blocks(rows, blocks)).tolist()
        assert sum(counts) == rows
        assert counts == sorted(counts)
        assert min(counts) >= 1


@pytest.mark.parametrize("limit", [30, 60, 100, 150, 163, 164])
def test_what_is_kept_fits_and_is_the_largest(limit: int) -> None:
    """Two tables of 11 and 30 rows, 4 wide: 164 numbers in all."""
    rng = torch.Generator().manual_seed(limit)
    sizes = {"a": torch.rand(3, 4, generator=rng), "b": torch.rand(2, 4, generator=rng)}
    lengths = {"a": [2, 4, 5], "b": [10, 20]}
    kept = widest(sizes, lengths, limit)
    spent = {n: blocks_params(lengths[n], mask.sum(1).tolist(), 4) for n, mask in kept.items()}
    assert sum(spent.values()) <= limit
    assert all(bool(mask.any()) for mask in kept.values())
    assert all(bool(mask.all()) for mask in kept.values()) == (limit == 164)
    for name, mask in kept.items():
        for block, (row, size) in enumerate(zip(mask, sizes[name], strict=True)):
            if bool(row.all()) or not bool(row.any()):
                continue
            assert size[row].min() > size[~row].max()
            width = int(row.sum())  # where a map is no smaller, all are kept
            assert width * (lengths[name][block] + 4) < lengths[name][block] * 4


def test_too_small_a_budget_is_said() -> None:
    sizes, lengths = {"a": torch.ones(1, 4), "b": torch.ones(1, 4)}, {"a": [9], "b": [9]}
    assert [int(mask.sum()) for mask in widest(sizes, lengths, 26).values()] == [1, 1]
    with pytest.raises(LowrankError, match=r"one dimension of 2 tables takes more .* the 25 that"):
        widest(sizes, lengths, 25)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"mode": "mean", "padding_idx": 0}])
@pytest.mark.parametrize(
    ("kept", "form"),
    [
        ("1111 1111 1111", None),
        ("0110 0110 0110", LowRankEmbedding),
        ("1111 0110 0000", BlockEmbedding),
        ("1011 0100 0100", BlockEmbedding),
    ],
)
def test_the_layer_that_remains(kept: str, form: type | None, options: dict[str, Any]) -> None:
    table, like = gated(**options)
    mask = torch.tensor([[c == "1" for c in block] for block in kept.split()])
    new = compacted(table, mask)
    assert type(new) is (form or type(like))
    with torch.no_grad():
        like.weight.mul_(mask[BLOCK])
    torch.testing.assert_close(new(IDS), like(IDS))
    if isinstance(new, BlockEmbedding):
        assert len(new.lengths) == len(set(kept.split()))  # neighbours that keep the same
        assert sorted(new.order.tolist()) == list(range(11))
