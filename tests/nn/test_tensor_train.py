"""Three cores for a table: they are the layer of what NumPy makes of them, options and all."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.nn import TensorTrainEmbedding, build, describe
from lowrank.nn.table_form import table_options

IDS = torch.tensor([1, 3, 5, 5, 2, 9, 0, 3, 10, 10])
BAGS: dict[str, dict[str, Any]] = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean", "padding_idx": 3},
    "max": {"mode": "max", "padding_idx": 0},
    "last": {"mode": "sum", "include_last_offset": True, "padding_idx": 2},
}


def layer_of(**options: Any) -> TensorTrainEmbedding:
    """Of 12 places for 11 rows, 3 · 2 · 2, and 8 columns, 2 · 2 · 2."""
    torch.manual_seed(1)
    return TensorTrainEmbedding(11, 8, 3, 4, **options).double()


def table_of(layer: TensorTrainEmbedding) -> np.ndarray:
    """Number by number."""
    first = layer.first.weight.detach().numpy().reshape(3, 2, 3)
    middle = layer.middle.weight.detach().numpy().reshape(2, 3, 2, 4)
    last = layer.last.weight.detach().numpy().reshape(2, 4, 2)
    found = np.zeros((11, 8))
    for i in range(11):
        for j in range(8):
            row = first[i // 4, j // 4] @ middle[i // 2 % 2, :, j // 2 % 2]
            found[i, j] = row @ last[i % 2, :, j % 2]
    if layer.padding_idx is not None:
        found[layer.padding_idx] = 0
    return found


def dense_of(layer: TensorTrainEmbedding, **options: Any) -> nn.Module:
    """Torch's layer of that table."""
    kind = nn.EmbeddingBag if "mode" in options else nn.Embedding
    dense = kind(11, 8, **options).double()
    with torch.no_grad():
        dense.weight.copy_(torch.from_numpy(table_of(layer)))
    return dense


def gradients(layer: TensorTrainEmbedding, table: Tensor) -> list[Tensor]:
    """Of the cores, from the gradient of the dense table."""
    return list(torch.autograd.grad((layer.dense_weight() * table).sum(), list(layer.parameters())))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}], ids=["plain", "padding"])
def test_it_gives_the_rows_of_its_table(options: dict[str, Any]) -> None:
    layer = layer_of(**options)
    assert (layer.digits, layer.columns) == ((3, 2, 2), (2, 2, 2))
    dense = dense_of(layer, **options)
    np.testing.assert_allclose(layer.dense_weight().detach(), table_of(layer), rtol=1e-12)
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
def test_bags_of_several_ids_pool_whole_rows(bag: str) -> None:
    layer = layer_of(**BAGS[bag])
    dense = dense_of(layer, **BAGS[bag])
    offsets = torch.tensor([0, 3, 3, 10] if bag == "last" else [0, 3, 3])
    weights = [None, torch.rand(10).double()] if BAGS[bag]["mode"] == "sum" else [None]
    for weight in weights:
        torch.testing.assert_close(layer(IDS, offsets, weight), dense(IDS, offsets, weight))
    layer(IDS, offsets).sin().sum().backward()
    dense(IDS, offsets).sin().sum().backward()
    for parameter, slope in zip(
        layer.parameters(), gradients(layer, dense.weight.grad), strict=True
    ):
        torch.testing.assert_close(parameter.grad, slope)


def test_a_lookup_builds_no_table() -> None:
    """Of a million rows, 4 MB of cores: nothing that is made is as long as the table."""
    layer = TensorTrainEmbedding(10**6, 16, 16, 16)
    assert layer.cost().params == 100 * (2 * 16 + 2 * 16 * 16 + 4 * 16)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            sizes.append(made.numel() if isinstance(made, Tensor) else 0)
            return made

    with torch.no_grad(), Sizes():
        rows = layer(torch.tensor([999_999, 0, 123_456]))
    assert rows.shape == (3, 16)
    assert max(sizes) == 3 * 16 * 2 * 16  # the slices of `middle`


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 3, "sparse": True}, {"scale_grad_by_freq": True}, *BAGS.values()],
)
def test_described_built_saved_and_merged(options: dict[str, Any], tmp_path: Any) -> None:
    layer = layer_of(**options)
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


@pytest.mark.parametrize("mode", [None, "sum", "max"])
def test_sparse_gradients_reach_all_cores_and_padding_has_none(mode: str | None) -> None:
    options = {} if mode is None else {"mode": mode}
    layer = layer_of(sparse=True, padding_idx=3, **options)
    layer(torch.tensor([[3, 3, 9]])).sum().backward()
    for child, row in ((layer.first, 2), (layer.middle, 0), (layer.last, 1)):
        slope = child.weight.grad
        assert slope.is_sparse
        assert slope.to_dense().abs().sum(1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("beyond", [11, 12, -1])
def test_an_id_that_the_table_does_not_have_is_refused(beyond: int) -> None:
    with pytest.raises(IndexError):
        layer_of()(torch.tensor([beyond]))


def test_torch_fx_traces_rows() -> None:
    layer = layer_of(padding_idx=3)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(IDS), layer(IDS))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mode": "median"}, "mode of a bag must be"),
        ({"colour": 1}, "colour"),
        ({"left": 0}, r"both ranks must be at least 1, got \(0, 4\)"),
        ({"left": "two"}, "sizes must be integers"),
        ({"rows": [3, 3, 1]}, r"at least 11, and three of columns, whose product is 8, got \(3, 3"),
        ({"rows": [12]}, "takes three numbers of rows"),
        ({"columns": [2, 2, 3]}, "whose product is 8"),
        ({"padding_idx": 11}, "padding_idx must be a row of 11, got 11"),
    ],
)
def test_a_bad_spec_is_one_error(change: dict[str, Any], said: str) -> None:
    spec = describe(layer_of())
    build(spec, "table")
    with pytest.raises(LowrankError, match=said):
        build({**spec, **change}, "table")


def test_cores_that_do_not_go_together_are_refused() -> None:
    make, like = TensorTrainEmbedding.from_cores, nn.Embedding(11, 8)
    first, middle, last = torch.ones(3, 2, 3), torch.ones(2, 3, 2, 4), torch.ones(2, 4, 2)
    assert make(first, middle, last, like).cost().params == 18 + 48 + 16
    with pytest.raises(LowrankError, match=r"expected a core \(2, 5, 2, 4\), got \(2, 3, 2, 4\)"):
        make(torch.ones(3, 2, 5), middle, last, like)
    with pytest.raises(LowrankError, match="takes three numbers of rows"):
        make(first, middle, torch.ones(1, 4, 2), like)
