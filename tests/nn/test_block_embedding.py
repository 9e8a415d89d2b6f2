"""Blocks of rows of different widths: they are the layer of the table that NumPy makes of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.nn import BlockEmbedding, build, describe
from lowrank.nn.table_form import table_options

IDS = torch.tensor([1, 3, 5, 5, 2, 9, 0, 3, 10, 10])
ORDER = torch.tensor([3, 10, 0, 7, 2, 9, 1, 4, 8, 6, 5])  # the place of every id
LENGTHS, WIDTHS = [2, 4, 3, 2], [6, 3, 0, 1]
BAGS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean", "padding_idx": 3},
    "max": {"mode": "max", "padding_idx": 0},
    "last": {"mode": "sum", "include_last_offset": True, "padding_idx": 2},
}
EITHER = pytest.mark.parametrize("ordered", [False, True], ids=["in order", "places"])


def layer_of(ordered: bool = False, **options: Any) -> BlockEmbedding:
    torch.manual_seed(1)
    layer = BlockEmbedding(11, 6, LENGTHS, WIDTHS, ordered=ordered, **options).double()
    if ordered:
        layer.order = ORDER.int()
    return layer


def table_of(layer: BlockEmbedding) -> np.ndarray:
    """Row by row."""
    state = {name: tensor.detach().numpy() for name, tensor in layer.state_dict().items()}
    rows = list(state["rows.0.weight"])
    rows += [state["up.1.weight"] @ row for row in state["rows.1.weight"]]
    rows += [np.zeros(6)] * 3
    rows += [state["up.3.weight"] @ row for row in state["rows.3.weight"]]
    table = np.stack(rows)
    if layer.order is not None:
        table = np.stack([table[place] for place in ORDER])
    if layer.padding_idx is not None:
        table[layer.padding_idx] = 0
    return table


def dense_of(layer: BlockEmbedding, **options: Any) -> nn.Module:
    """Torch's layer of that table."""
    kind = nn.EmbeddingBag if "mode" in options else nn.Embedding
    dense = kind(11, 6, **options).double()
    with torch.no_grad():
        dense.weight.copy_(torch.from_numpy(table_of(layer)))
    return dense


def same_gradients(layer: BlockEmbedding, table: Tensor) -> None:
    """Those of the blocks are what the gradient of the dense table gives."""
    parameters = list(layer.parameters())
    wanted = torch.autograd.grad((layer.dense_weight() * table).sum(), parameters)
    for parameter, slope in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, slope)


@EITHER
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}], ids=["plain", "padding"])
def test_it_gives_the_rows_of_its_table(ordered: bool, options: dict[str, Any]) -> None:
    layer = layer_of(ordered, **options)
    dense = dense_of(layer, **options)
    np.testing.assert_allclose(layer.dense_weight().detach(), table_of(layer), rtol=1e-12)
    torch.testing.assert_close(layer.weight + 0, dense.weight.detach(), check_dtype=False)
    got, want = layer(IDS.view(2, 5)), dense(IDS.view(2, 5))
    torch.testing.assert_close(got, want)
    got.sin().sum().backward()
    want.sin().sum().backward()
    same_gradients(layer, dense.weight.grad)


@EITHER
@pytest.mark.parametrize("bag", BAGS)
def test_bags_pool_whole_rows(ordered: bool, bag: str) -> None:
    layer = layer_of(ordered, **BAGS[bag])
    dense = dense_of(layer, **BAGS[bag])
    offsets = torch.tensor([0, 3, 3, 10] if bag == "last" else [0, 3, 3])
    torch.testing.assert_close(layer(IDS, offsets), dense(IDS, offsets))
    layer(IDS, offsets).sin().sum().backward()
    dense(IDS, offsets).sin().sum().backward()
    same_gradients(layer, dense.weight.grad)


@EITHER
def test_it_costs_what_it_stores(ordered: bool) -> None:
    layer = layer_of(ordered)
    assert layer.cost().params == sum(p.numel() for p in layer.parameters())
    assert layer.cost().params == 2 * 6 + 4 * 3 + 2 * 1 + 6 * (3 + 1)
    assert layer.cost().bytes == sum(t.nbytes for t in layer.state_dict().values())
    assert layer.cost().macs == 6 * (3 + 1)


@EITHER
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3, "sparse": True}, *BAGS.values()])
def test_described_built_saved_and_merged(
    ordered: bool, options: dict[str, Any], tmp_path: Any
) -> None:
    layer = layer_of(ordered, **options)
    again = build(json.loads(json.dumps(describe(layer))), "table")
    assert {p.device.type for p in again.parameters()} == {"meta"}
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again(IDS.view(2, 5)), layer(IDS.view(2, 5)))
    dense = dense_of(layer, **options)
    lowrank.save(nn.Sequential(layer), tmp_path)
    loaded = lowrank.load(tmp_path, nn.Sequential(dense.float()))
    assert torch.equal(loaded[0](IDS.view(2, 5)), layer(IDS.view(2, 5)))
    merged = lowrank.to_dense(loaded)[0]
    assert type(merged) is type(dense)
    assert table_options(merged) == table_options(dense) == options
    np.testing.assert_allclose(merged.weight.detach(), table_of(layer), rtol=1e-12)


@EITHER
@pytest.mark.parametrize("beyond", [11, 12, -1])
def test_an_id_that_the_table_does_not_have_is_refused(ordered: bool, beyond: int) -> None:
    with pytest.raises(IndexError):
        layer_of(ordered)(torch.tensor([beyond]))


def test_sparse_gradients_are_of_the_rows_that_were_read() -> None:
    layer = layer_of(sparse=True)
    layer(torch.tensor([3, 3, 1])).sum().backward()
    for block, row in (("0", 1), ("1", 1)):
        slope = layer.rows[block].weight.grad
        assert slope.is_sparse
        assert slope.to_dense().abs().sum(1).nonzero().flatten().tolist() == [row]


def test_torch_fx_traces_rows() -> None:
    layer = layer_of(padding_idx=3)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(IDS), layer(IDS))


def test_a_damaged_order_is_a_fault() -> None:
    layer = layer_of(ordered=True)
    assert layer.fault() == layer_of().fault() == ""
    layer.order[3] = 3
    assert "order must hold every number in [0, 10] once" in layer.fault()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mode": "median"}, "mode of a bag must be"),
        ({"colour": 1}, "colour"),
        ({"lengths": [2, 4, 3, 3]}, r"of 11 rows takes blocks whose lengths .* got \[2, 4, 3, 3\]"),
        ({"lengths": [11]}, "and a width for each"),
        ({"lengths": [2, 4, 5, 0]}, "lengths are at least 1"),
        ({"widths": [7, 3, 0, 1]}, r"widths must be in \[0, 6\] and not all 0, got \[7"),
        ({"widths": [0, 0, 0, 0]}, "not all 0"),
        ({"padding_idx": 11}, "padding_idx must be a row of 11, got 11"),
    ],
)
def test_a_bad_spec_is_one_error(change: dict[str, Any], said: str) -> None:
    spec = describe(layer_of())
    build(spec, "table")
    with pytest.raises(LowrankError, match=said):
        build({**spec, **change}, "table")
