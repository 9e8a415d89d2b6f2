"""Two tables for one: it is the layer of the table that NumPy makes of them, options and all."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.nn import QuotientRemainderEmbedding, build, describe
from lowrank.nn.table_form import table_options

OPS = ("mult", "add", "concat")
IDS = torch.tensor([1, 3, 5, 5, 2, 9, 0, 3, 10, 10])
BAGS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean", "padding_idx": 3},
    "max": {"mode": "max", "padding_idx": 0},
    "last": {"mode": "sum", "include_last_offset": True, "padding_idx": 2},
}


def layer_of(op: str, **options: Any) -> QuotientRemainderEmbedding:
    torch.manual_seed(1)
    return QuotientRemainderEmbedding(11, 7, 4, op=op, **options).double()


def table_of(layer: QuotientRemainderEmbedding) -> np.ndarray:
    """Row by row."""
    q, r = (child.weight.detach().numpy() for child in (layer.quotient, layer.remainder))
    rows = []
    for i in range(11):
        parts = q[i // 4], r[i % 4]
        rows.append({"mult": np.multiply, "add": np.add}[layer.op](*parts)
                    if layer.op != "concat" else np.concatenate(parts))  # fmt: skip
    if layer.padding_idx is not None:
        rows[layer.padding_idx] = np.zeros(7)
    return np.stack(rows)


def dense_of(layer: QuotientRemainderEmbedding, **options: Any) -> nn.Module:
    """Torch's layer of that table."""
    kind = nn.EmbeddingBag if "mode" in options else nn.Embedding
    dense = kind(11, 7, **options).double()
    with torch.no_grad():
        dense.weight.copy_(torch.from_numpy(table_of(layer)))
    return dense


def gradients(layer: QuotientRemainderEmbedding, table: Tensor) -> list[Tensor]:
    """Of both tables, from the gradient of the dense one."""
    slopes = torch.autograd.grad((layer.dense_weight() * table).sum(), list(layer.parameters()))
    return list(slopes)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}], ids=["plain", "padding"])
@pytest.mark.parametrize("op", OPS)
def test_it_gives_the_rows_of_its_table(op: str, options: dict[str, Any]) -> None:
    layer = layer_of(op, **options)
    dense = dense_of(layer, **options)
    np.testing.assert_allclose(layer.dense_weight().detach(), table_of(layer), rtol=1e-15)
    torch.testing.assert_close(layer.weight + 0, dense.weight.detach(), check_dtype=False)
    got, want = layer(IDS.view(2, 5)), dense(IDS.view(2, 5))
    torch.testing.assert_close(got, want)
    assert layer.cost().params == sum(p.numel() for p in layer.parameters())
    assert layer.cost().bytes == 8 * layer.cost().params
    got.sin().sum().backward()
    want.sin().sum().backward()
    for parameter, slope in zip(
        layer.parameters(), gradients(layer, dense.weight.grad), strict=True
    ):
        torch.testing.assert_close(parameter.grad, slope)


@pytest.mark.parametrize("bag", BAGS)
@pytest.mark.parametrize("op", OPS)
def test_bags_of_several_ids_pool_whole_rows(op: str, bag: str) -> None:
    """Not those of each table: a sum of products is no product of sums."""
    layer = layer_of(op, **BAGS[bag])
    dense = dense_of(layer, **BAGS[bag])
    offsets = torch.tensor([0, 3, 3, 10] if bag == "last" else [0, 3, 3])
    weights = [None, torch.rand(10).double()] if BAGS[bag]["mode"] == "sum" else [None]
    given = [(IDS, offsets, w) for w in weights]
    if bag != "last":
        given += [(IDS.view(2, 5), None, w if w is None else w.view(2, 5)) for w in weights]
    for ids, places, weight in given:
        torch.testing.assert_close(layer(ids, places, weight), dense(ids, places, weight))
    layer(IDS, offsets).sin().sum().backward()
    dense(IDS, offsets).sin().sum().backward()
    for parameter, slope in zip(
        layer.parameters(), gradients(layer, dense.weight.grad), strict=True
    ):
        torch.testing.assert_close(parameter.grad, slope)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 3, "sparse": True}, {"scale_grad_by_freq": True}, *BAGS.values()],
)
@pytest.mark.parametrize("op", OPS)
def test_described_built_saved_and_merged(op: str, options: dict[str, Any], tmp_path: Any) -> None:
    layer = layer_of(op, **options)
    again = build(json.loads(json.dumps(describe(layer))), "table")
    assert {p.device.type for p in again.parameters()} == {"meta"}
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again(IDS.view(2, 5)), layer(IDS.view(2, 5)))
    dense = dense_of(layer, **options)
    lowrank.save(nn.Sequential(layer), tmp_path)
    loaded = lowrank.load(tmp_path, nn.Sequential(dense.float()))
    assert torch.equal(loaded[0](IDS.view(2, 5)), layer(IDS.view(2, 5)))
    other = nn.Sequential(nn.EmbeddingBag(11, 7, padding_idx=5, mode="sum"))
    with pytest.raises(LowrankError, match="stored with options"):
        lowrank.load(tmp_path, other)
    merged = lowrank.to_dense(loaded)[0]
    assert type(merged) is type(dense)
    assert table_options(merged) == table_options(dense) == options
    np.testing.assert_allclose(merged.weight.detach(), table_of(layer))


@pytest.mark.parametrize("mode", [None, "sum", "max"])
def test_sparse_gradients_reach_both_tables_and_padding_has_none(mode: str | None) -> None:
    options = {} if mode is None else {"mode": mode}
    layer = layer_of("mult", sparse=True, padding_idx=3, **options)
    layer(torch.tensor([[3, 3, 9]])).sum().backward()
    for child, row in ((layer.quotient, 9 // 4), (layer.remainder, 9 % 4)):
        slope = child.weight.grad
        assert slope.is_sparse
        assert slope.to_dense().abs().sum(1).nonzero().flatten().tolist() == [row]
    torch.optim.SparseAdam(list(layer.parameters()), lr=0.1).step()
    if mode is None:
        assert torch.equal(layer(torch.tensor([3])), torch.zeros(1, 7).double())


@pytest.mark.parametrize("beyond", [11, 12, -1])
def test_an_id_that_the_table_does_not_have_is_refused(beyond: int) -> None:
    """12 rows could be read from three times four."""
    with pytest.raises(IndexError):
        layer_of("add")(torch.tensor([beyond]))


def test_torch_fx_traces_rows_and_says_what_to_do_with_bags() -> None:
    layer = layer_of("mult", padding_idx=3)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert torch.equal(traced(IDS), layer(IDS))
    with pytest.raises(LowrankError, match=r"torch.fx cannot trace a bag.*torch.export"):
        torch.fx.symbolic_trace(nn.Sequential(layer_of("mult", mode="sum")))


def test_offsets_are_for_bags() -> None:
    with pytest.raises(TypeError, match="for an EmbeddingBag"):
        layer_of("mult")(IDS, torch.tensor([0]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"op": "power"}, "unknown op"),
        ({"op": 3}, "sizes must be integers"),
        ({"mode": "median"}, "mode of a bag must be"),
        ({"colour": 1}, "colour"),
        ({"include_last_offset": True}, "cannot be built"),
        ({"remainders": 12}, r"remainders must be in \[1, 11\]"),
        ({"remainders": 0}, r"in \[1, 11\] for 11 rows, got 0"),
        ({"width": 3}, "width must be 7, all columns for op 'mult', got 3"),
        ({"op": "concat"}, "width must be below 7 for op 'concat', got 7"),
        ({"padding_idx": 11}, "padding_idx must be a row of 11, got 11"),
    ],
)
def test_a_bad_spec_is_one_error(change: dict[str, Any], said: str) -> None:
    spec = describe(layer_of("mult"))
    build(spec, "table")
    with pytest.raises(LowrankError, match=said):
        build({**spec, **change}, "table")


def test_a_padding_index_may_count_from_the_end() -> None:
    assert layer_of("mult", padding_idx=-1).padding_idx == 10


def test_tables_of_other_sizes_are_refused() -> None:
    like = nn.Embedding(11, 7)
    make = QuotientRemainderEmbedding.from_tables
    assert make(torch.ones(3, 7), torch.ones(4, 7), like, "add").cost().params == 49
    with pytest.raises(LowrankError, match=r"expected a table \(3, 7\)"):
        make(torch.ones(4, 7), torch.ones(4, 7), like, "add")
