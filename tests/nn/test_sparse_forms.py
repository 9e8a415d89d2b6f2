"""What each of the forms alone has to keep: names of tensors, indices, sizes that do not exist."""

from __future__ import annotations

import pytest
import torch

import lowrank.nn.dense_sparse as dense_sparse_module
from lowrank.errors import LowrankError
from lowrank.nn import (
    BlastLinear,
    BlockLowRankLinear,
    DenseSparseLinear,
    LowRankMaskedLinear,
    LowRankSparseLinear,
    build,
)
from lowrank.nn.lowrank_masked import pack, unpack

from .forms import blast, block_lowrank, dense_sparse, lowrank_masked, lowrank_sparse


def shapes(layer: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def test_names_and_shapes_of_the_tensors_are_a_contract() -> None:
    assert shapes(dense_sparse(7, 10).layer) == {
        "basis.weight": (5, 10), "value": (7, 2), "index": (7, 2), "bias": (7,),
    }  # fmt: skip
    assert shapes(lowrank_sparse(7, 10).layer) == {
        "down.weight": (2, 10), "up.weight": (7, 2), "up.bias": (7,), "sparse.weight": (7, 3),
        "sparse.index": (3,),
    }  # fmt: skip
    assert shapes(blast(7, 10).layer) == {
        "left": (3, 3, 2), "mix": (3, 3, 2), "right": (3, 2, 4), "bias": (7,),
    }  # fmt: skip
    assert lowrank_sparse(7, 10).layer.sparse.index.dtype == torch.int32
    layer = lowrank_masked(7, 10).layer
    assert shapes(layer) == {
        "down.weight": (2, 10), "up.weight": (7, 2), "up.bias": (7,),
        "sparse.weight": (layer.count,), "sparse.mask": (7, 2),
    }  # fmt: skip
    assert layer.sparse.mask.dtype == torch.uint8
    layer = block_lowrank(7, 10).layer
    assert shapes(layer) == {
        "down.weight": (layer.spec()["inputs"],), "down.place": (3, 2),
        "up.weight": (layer.spec()["outputs"],), "up.place": (3, 2), "bias": (7,),
    }  # fmt: skip
    assert layer.down.place.dtype == torch.int32


@pytest.mark.parametrize(
    ("rank", "dtype"), [(256, torch.uint8), (257, torch.int32), (32768, torch.int32)]
)
def test_an_index_is_as_short_as_it_can_be(rank: int, dtype: torch.dtype) -> None:
    """The last atom is read, so that no index overflows."""
    value, index = torch.tensor([[2.0]]), torch.tensor([[rank - 1]])
    basis = torch.zeros(rank, 1)
    basis[-1] = 3
    layer = DenseSparseLinear.from_code(basis, value, index, None)
    assert layer.index.dtype == dtype
    assert layer.cost().bytes == 4 * (rank + 1) + dtype.itemsize
    with torch.no_grad():
        assert layer(torch.ones(1)).tolist() == [6]
    assert layer(torch.ones(1)).tolist() == [6]
    assert layer.dense_weight().tolist() == [[6]]


def test_few_tokens_are_gathered_and_many_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways give the same; gathered are 4 to 128 r / s tokens, and never a graph."""
    layer = dense_sparse(7, 10).layer  # s = 2, r = 5
    calls: list[int] = []
    real = torch.nn.functional.embedding_bag
    monkeypatch.setattr(
        dense_sparse_module.F, "embedding_bag", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    x = torch.randn(321, 10, dtype=torch.float64)
    with torch.no_grad():
        few = layer(x[:320])
        assert calls == [1]
        many = layer(x)
        assert calls == [1]
    torch.testing.assert_close(few, many[:320])
    layer(x[:4])
    assert calls == [1]
    layer.requires_grad_(False)
    torch.testing.assert_close(layer(x[:3]), many[:3])
    assert calls == [1]
    torch.testing.assert_close(layer(x[:4]), many[:4])
    assert calls == [1, 1]


@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize("lead", [(512,), (2, 256)])
def test_many_tokens_are_one_product(
    gamma: float | None, lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 512 on, without a graph; the result is that of two products."""
    layer = lowrank_sparse(7, 10).layer
    layer.gamma = gamma
    calls: list[tuple[int, ...]] = []
    real = torch.cat
    monkeypatch.setattr(torch, "cat", lambda t, d: calls.append(t[0].shape) or real(t, d))
    x = torch.randn(*lead, 10, dtype=torch.float64)
    want = layer(x).detach()
    assert not calls
    with torch.no_grad():
        layer(x.flatten(0, -2)[:511])
        assert not calls
        got = layer(x)
    assert len(calls) == 2
    assert got.shape == (*lead, 7)
    torch.testing.assert_close(got, want)


def test_a_column_belongs_to_its_input() -> None:
    """By hand; moved by one input, the output is another."""
    parts = torch.zeros(1, 3), torch.zeros(2, 1), torch.tensor([[5.0], [7.0]])
    right = LowRankSparseLinear.from_parts(*parts, torch.tensor([1]), None)
    wrong = LowRankSparseLinear.from_parts(*parts, torch.tensor([2]), None)
    x = torch.tensor([0.0, 1.0, 0.0])
    assert right(x).tolist() == [5, 7]
    assert wrong(x).tolist() == [0, 0]
    assert right.dense_weight().tolist() == [[0, 5, 0], [0, 7, 0]]


def test_a_bit_belongs_to_its_entry() -> None:
    """By hand: the least bit of a byte is the first of its inputs; rows do not share bytes."""
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, 1] = mask[0, 8] = mask[1, 0] = True
    assert pack(mask).tolist() == [[2, 1], [1, 0]]
    assert torch.equal(unpack(pack(mask), 10), mask)
    entries = torch.arange(20.0).view(2, 10)
    parts = torch.zeros(1, 10), torch.zeros(2, 1), entries, mask
    layer = LowRankMaskedLinear.from_parts(*parts, None)
    assert layer.sparse.weight.tolist() == [1, 8, 10]
    assert torch.equal(layer.dense_weight(), entries * mask)
    x = torch.zeros(10)
    x[8] = 1
    assert layer(x).tolist() == [8, 0]


def test_masks_that_do_not_fit_are_refused() -> None:
    down, up, entries = torch.ones(1, 3), torch.ones(2, 1), torch.ones(2, 3)
    for mask, said in (
        (torch.ones(3, 2, dtype=torch.bool), r"mask of shape \(2, 3\).* of \(3, 2\)"),
        (torch.ones(2, 3), "torch.float32"),
        (torch.zeros(2, 3, dtype=torch.bool), r"count must be in \[1, 6\].*got 0"),
    ):
        with pytest.raises(LowrankError, match=said):
            LowRankMaskedLinear.from_parts(down, up, entries, mask, None)


def test_a_run_goes_round_the_end() -> None:
    """By hand: numbers stand from the least column on; few tokens, many, and the dense weight."""
    up, down = torch.arange(1.0, 5).view(4, 1), torch.tensor([[10.0, 20, 30]])
    places = torch.tensor([[3], [1]]), torch.tensor([[2], [2]])  # rows 3 and 0, columns 1 and 2
    layer = BlockLowRankLinear.from_terms(up, down, *places, None)
    assert layer.up.weight.tolist() == [1, 4]
    assert layer.down.weight.tolist() == [20, 30]
    want = [[0, 20, 30], [0, 0, 0], [0, 0, 0], [0, 80, 120]]
    assert layer.dense_weight().tolist() == want
    assert layer.cost().params == layer.cost().macs == 4
    assert layer.cost().bytes == 4 * 4 + 4 * 4
    x = torch.tensor([1.0, 2, 3])
    assert layer(x).tolist() == [130, 0, 0, 520]
    with torch.no_grad():
        assert layer(x).tolist() == [130, 0, 0, 520]


def test_for_few_tokens_only_what_is_stored_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 32 without a graph; where the runs are moved, the products follow."""
    layer = block_lowrank(7, 10).layer
    read: list[int] = []
    real = torch.nn.functional.embedding_bag
    monkeypatch.setattr(
        torch.nn.functional,
        "embedding_bag",
        lambda index, *a, **k: read.append(len(index)) or real(index, *a, **k),
    )
    x = torch.randn(33, 10, dtype=torch.float64)
    with torch.no_grad():
        many = layer(x)
        assert read == []
        torch.testing.assert_close(layer(x[:32]), many[:32])
        assert sum(read) == layer.cost().macs
        layer.down.place[1, 0] = (layer.down.place[1, 0] + 1) % 10
        torch.testing.assert_close(layer(x[:2]), layer(x)[:2])
    read.clear()
    layer(x[:2])
    assert read == []


def test_starts_and_widths_of_long_sides() -> None:
    long = BlockLowRankLinear.empty(
        in_features=40_000, out_features=3, rank=2, inputs=7, outputs=4, bias=False
    )
    assert long.down.place.dtype == long.up.place.dtype == torch.int32
    assert long.cost().bytes == 4 * 11 + 2 * (8 + 8)


@pytest.mark.parametrize(
    "places",
    [
        ([[4], [0]], [[1], [1]]), ([[0], [-1]], [[1], [1]]), ([[0], [0]], [[0], [1]]),
        ([[0], [0]], [[1], [4]]), ([[0, 1], [0, 1]], [[1, 1], [1, 1]]),
    ],
)  # fmt: skip
def test_runs_that_do_not_fit_are_refused(places: tuple[list[list[int]], ...]) -> None:
    parts = torch.ones(4, 1), torch.ones(1, 3), *map(torch.tensor, places)
    with pytest.raises(LowrankError, match="runs within 4 rows and 3 columns, got"):
        BlockLowRankLinear.from_terms(*parts, None)


def test_codes_that_do_not_fit_are_refused() -> None:
    basis, value = torch.ones(4, 3), torch.ones(2, 2)
    for index, said in (
        ([[0, 1], [2, 4]], r"atoms in \[0, 3\]"),
        ([[0, 1], [-1, 2]], r"values in \[-1, 2\]"),
        ([[0, 1], [3, 3]], "some repeated"),
        ([[0, 1]], r"shape \(1, 2\)"),
    ):
        with pytest.raises(LowrankError, match=said):
            DenseSparseLinear.from_code(basis, value, torch.tensor(index), None)


@pytest.mark.parametrize("index", [[2, 1], [1, 1], [0, 3], [-1, 1], [1]])
def test_channels_that_do_not_fit_are_refused(index: list[int]) -> None:
    parts = torch.ones(1, 3), torch.ones(2, 1), torch.ones(2, 2)
    with pytest.raises(LowrankError, match=r"expected 2 ascending inputs in \[0, 2\], got"):
        LowRankSparseLinear.from_parts(*parts, torch.tensor(index), None)


def test_factors_of_another_shape_are_refused() -> None:
    left, mix, right = torch.ones(2, 3, 4), torch.ones(2, 2, 4), torch.ones(2, 4, 3)
    BlastLinear.from_factors(left, mix, right, None, shape=(6, 5))
    with pytest.raises(LowrankError, match=r"expected right of shape \(2, 4, 4\)"):
        BlastLinear.from_factors(left, mix, right, None, shape=(6, 7))


NONSENSE = {
    "more coefficients than atoms": ("DenseSparseLinear", {"rank": 3, "count": 4}, "3 atoms"),
    "none": ("DenseSparseLinear", {"rank": 3, "count": 0}, "0 coefficients"),
    "too many atoms": ("DenseSparseLinear", {"rank": 40_000, "count": 1}, "<= 32768"),
    "more channels than inputs": ("LowRankSparseLinear", {"rank": 2, "count": 9}, r"\[1, 8\]"),
    "no channel": ("LowRankSparseLinear", {"rank": 2, "count": 0}, "got 0"),
    "more entries than there are": ("LowRankMaskedLinear", {"rank": 2, "count": 49}, r"\[1, 48\]"),
    "more blocks than rows": ("BlastLinear", {"blocks": 7, "rank": 2}, r"blocks in \[1, 6\]"),
    "less than an entry a block": (
        "BlockLowRankLinear",
        {"rank": 3, "inputs": 2, "outputs": 3},
        r"inputs in \[rank, rank · 8\]",
    ),
    "more than there are rows": (
        "BlockLowRankLinear",
        {"rank": 1, "inputs": 2, "outputs": 7},
        r"outputs in \[rank, rank · 6\]",
    ),
    "no rank": ("BlastLinear", {"blocks": 2, "rank": 0}, "got 2 and 0"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_sizes_that_do_not_exist_are_refused(name: str) -> None:
    kind, sizes, said = NONSENSE[name]
    spec = {"type": kind, "in_features": 8, "out_features": 6, "bias": True, **sizes}
    with pytest.raises(LowrankError, match=said) as caught:
        build(spec, "model.fc")
    assert "model.fc" in str(caught.value)
