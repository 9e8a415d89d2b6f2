"""A token table as a product: it is the layer that it replaced, options and all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.nn import LowRankEmbedding, TiedEmbedding, TiedHead, build, describe
from lowrank.nn.table_form import table_options

TABLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "sparse": {"sparse": True},
    "scaled": {"scale_grad_by_freq": True, "padding_idx": 0},
}
BAGS: dict[str, dict[str, Any]] = {
    "mean": {"mode": "mean"},
    "sum": {"mode": "sum", "padding_idx": 3, "sparse": True},
    "max": {"mode": "max", "padding_idx": 3},
    "last": {"mode": "sum", "include_last_offset": True, "padding_idx": 2},
}
IDS = torch.tensor([1, 3, 5, 5, 2, 9, 0, 3])


def table(**options: Any) -> nn.Embedding:
    return nn.Embedding(11, 7, **options)


def exact(dense: nn.Module) -> LowRankEmbedding:
    """Factors of the whole rank, by numpy's SVD."""
    u, s, v = torch.linalg.svd(dense.weight.detach().double(), full_matrices=False)
    return LowRankEmbedding.from_factors((u * s).float(), v.T.float(), dense)


def product(layer: LowRankEmbedding) -> Tensor:
    return (layer.rows.weight @ layer.up.weight.T).detach()


@pytest.mark.parametrize("options", TABLES.values(), ids=TABLES)
def test_it_gives_the_rows_of_its_dense_weight(options: dict[str, Any]) -> None:
    dense = table(**options)
    layer = exact(dense)
    torch.testing.assert_close(layer(IDS.view(2, 4)), dense(IDS.view(2, 4)))
    torch.testing.assert_close(layer.weight, dense.weight.detach(), check_dtype=False)
    assert (layer.num_embeddings, layer.embedding_dim, layer.rank) == (11, 7, 7)
    assert layer.padding_idx == dense.padding_idx
    assert layer.cost().params == sum(p.numel() for p in layer.parameters()) == 7 * 18


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", BAGS.values(), ids=BAGS)
def test_bags_pool_as_they_did(options: dict[str, Any], weighted: bool) -> None:
    if weighted and options["mode"] != "sum":
        pytest.skip("torch weighs only sums")
    dense = nn.EmbeddingBag(11, 7, **options)
    layer = exact(dense)
    offsets = torch.tensor([0, 3, 3, 8] if options.get("include_last_offset") else [0, 3, 3])
    extra = {"per_sample_weights": torch.rand(len(IDS))} if weighted else {}
    got, want = (each(IDS, offsets, **extra) for each in (layer, dense))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [*TABLES.values(), *BAGS.values()], ids=[*TABLES, *BAGS])
def test_described_built_and_merged_with_all_options(options: dict[str, Any]) -> None:
    dense = (nn.EmbeddingBag if "mode" in options else nn.Embedding)(11, 7, **options)
    layer = exact(dense)
    again = build(json.loads(json.dumps(describe(layer))), "table")
    assert {p.device.type for p in again.parameters()} == {"meta"}
    again.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(again.weight, layer.weight)
    merged = lowrank.to_dense(layer)
    assert type(merged) is type(dense)
    assert table_options(merged) == table_options(dense) == again.options()
    torch.testing.assert_close(merged.weight, dense.weight)


def test_sparse_gradients_reach_the_rows_and_padding_has_none() -> None:
    dense = table(sparse=True, padding_idx=3)
    layer = lowrank.compress(dense, rank=3, target_modules="all")[0]
    assert torch.equal(layer.weight[3], torch.zeros(7))  # bit for bit
    layer(IDS).square().sum().backward()
    grad = layer.rows.weight.grad
    assert grad.is_sparse
    assert layer.up.weight.grad.abs().sum() > 0
    assert torch.equal(grad.to_dense()[3], torch.zeros(3))
    assert grad.to_dense()[5].abs().sum() > 0
    for optimizer, parameters in (
        (torch.optim.SparseAdam, layer.rows.parameters()),
        (torch.optim.Adam, layer.up.parameters()),
    ):
        optimizer(list(parameters), lr=0.1).step()
    assert torch.equal(layer(torch.tensor([3])), torch.zeros(1, 7))


@pytest.mark.parametrize("rows", [5, 40])  # the projection is on the columns, whatever is smaller
@pytest.mark.parametrize("method", ["svd", "frequency"])
def test_a_zero_padding_row_stays_exactly_zero(method: str, rows: int) -> None:
    dense = nn.Embedding(rows, 8, padding_idx=1)
    ids = torch.arange(rows)
    kept = lowrank.compress(
        dense, rank=2, method=method, data=ids, target_modules="all", progress=False
    )[0]
    assert torch.equal(kept.rows.weight[1], torch.zeros(2))


def test_a_truncated_bag_takes_the_largest_of_whole_rows() -> None:
    """A maximum of factors, multiplied then, is another number."""
    dense = nn.EmbeddingBag(40, 8, mode="max", padding_idx=2)
    layer, report = lowrank.compress(dense, rank=3, target_modules="all", progress=False)
    assert type(layer) is LowRankEmbedding
    assert report.params_after == 3 * 48
    ids = torch.tensor([[1, 5, 2, 9], [30, 30, 7, 2]])
    kept = [[i for i in row if i != 2] for row in ids.tolist()]
    want = torch.stack([product(layer)[row].max(0).values for row in kept])
    torch.testing.assert_close(layer(ids), want)


def doubled(*sizes: int) -> nn.Module:
    def forward(self: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
        return nn.Embedding.forward(self, input) * self.scale

    own = type("Own", (nn.Embedding,), {"forward": forward})(*sizes)
    own.register_buffer("scale", torch.tensor(2.0))
    return own


def test_what_cannot_be_a_product_is_refused_with_the_reason() -> None:
    for dense, words in (
        (table(max_norm=1.0), "max_norm=1.0 rescales rows when read"),
        (doubled(11, 7), "Own multiplies what it reads by 2"),
    ):
        model = nn.ModuleDict({"emb": dense, "fc": nn.Linear(8, 8)})
        before = [id(module) for module in model.modules()]
        with pytest.raises(LowrankError, match=words):
            lowrank.compress(model, 0.5, target_modules=["emb"])
        with pytest.raises(LowrankError, match=words):
            lowrank.compress(model, 0.5, target_modules="all", rank_pattern={"emb": 2})
        (entry, _) = lowrank.plan(model, 0.5, target_modules="all").entries
        assert words in entry.reason
        assert [id(module) for module in model.modules()] == before


def test_offsets_are_for_bags() -> None:
    with pytest.raises(TypeError, match="for an EmbeddingBag"):
        exact(table())(IDS, torch.tensor([0]))


@pytest.mark.parametrize("change", [{"mode": "median"}, {"mode": 3}, {"colour": 1}, {"rank": "2"}])
def test_a_bad_spec_is_one_error(change: dict[str, Any]) -> None:
    spec = {"type": "LowRankEmbedding", "num_embeddings": 5, "embedding_dim": 4, "rank": 2}
    build(spec, "table")
    with pytest.raises(LowrankError, match=r"^(table|mode)"):
        build({**spec, **change}, "table")


def test_readers_hold_nothing_of_the_table() -> None:
    layer = exact(table())
    head = TiedHead.of(layer, nn.Parameter(torch.randn(11)))
    other = TiedEmbedding.of(layer)
    assert list(head.state_dict()) == ["bias"]
    assert list(other.state_dict()) == [] == list(other.modules())[1:]
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(head(x), nn.functional.linear(x, product(layer), head.bias))
    assert torch.equal(other(IDS), layer(IDS))
    with torch.no_grad():
        layer.rows.weight.zero_()
    assert torch.equal(head(x), head.bias.expand(2, 3, 11))
    with pytest.raises(LowrankError, match="never bound"):
        build(describe(head), "head")(x)
    with pytest.raises(LowrankError, match=r"cannot share LowRankEmbedding of \(11, 7, 7\)"):
        TiedHead(11, 7, 3).bind(layer)
