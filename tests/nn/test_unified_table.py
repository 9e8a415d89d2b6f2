"""One table for many features: hashes by hand, bags of torch, files, refusals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank.errors import LowrankError
from lowrank.nn import UnifiedEmbedding, UnifiedReader, build, describe
from lowrank.nn.unified_table import PRIME, hash_of

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "sum": {"mode": "sum", "padding_idx": 5},
    "mean": {"mode": "mean"},
    "max": {"mode": "max"},
}
IDS = torch.tensor([[1, 3, 5, 5, 2], [9, 0, 3, 10, 10]])


def pair(**options: Any) -> tuple[UnifiedEmbedding, UnifiedReader]:
    """A feature of width 4 that stores 13 rows of 2, and one of width 6 that reads them."""
    first = UnifiedEmbedding(20, 4, 13, 2, feature=0, seed=7)
    rng = torch.Generator().manual_seed(0)
    first.set_table(torch.randn(13, 2, generator=rng).double())
    return first, UnifiedReader(11, 6, 13, 3, feature=1, seed=7, **options).bind(first)


def by_hand(layer: Any) -> np.ndarray:
    """Row by row, in Python's integers."""
    table, rows = layer.table().weight.detach().numpy(), []
    for i in range(layer.num_embeddings):
        places = []
        for lookup in range(layer.lookups):
            a, b = hash_of(layer.seed, layer.feature, lookup)
            places.append((a * i + b) % (2**31 - 1) % 13)
        zero = 0.0 if i == layer.padding_idx else 1.0
        rows.append(zero * np.concatenate([table[place] for place in places]))
    return np.stack(rows)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_both_give_the_rows_that_the_hashes_say(options: dict[str, Any]) -> None:
    first, reader = pair(**options)
    np.testing.assert_array_equal(first(torch.arange(20)).detach(), by_hand(first))
    want = torch.from_numpy(by_hand(reader))
    torch.testing.assert_close(reader.dense_weight(), want)
    torch.testing.assert_close(reader.weight + 0, want)
    dense = reader.dense(nn.Parameter(want.clone()))
    assert (type(dense) is nn.EmbeddingBag) == ("mode" in options)
    torch.testing.assert_close(reader(IDS), dense(IDS))
    reader(IDS).sin().sum().backward()
    got, first.shared.weight.grad = first.shared.weight.grad, None
    dense(IDS).sin().sum().backward()
    (reader.dense_weight() * dense.weight.grad).sum().backward()
    torch.testing.assert_close(got, first.shared.weight.grad)


def test_hashes_are_drawn_for_every_feature_and_spread() -> None:
    """The numbers are part of the format: a file stores none of them."""
    assert hash_of(0, 0, 0) == (1_191_613_828, 1_831_398_269)
    found = {hash_of(s, f, lookup) for s in range(3) for f in range(5) for lookup in range(4)}
    assert len(found) == 60
    assert all(1 <= a < PRIME and 0 <= b < PRIME for a, b in found)
    layer = UnifiedReader(50_000, 4, 1000, 2, feature=3, seed=1)
    rows = layer.hashed(torch.arange(50_000))
    for column in rows.T:
        counts = torch.bincount(column, minlength=1000).double()
        assert counts.min() > 0
        assert counts.std() < 2 * 50**0.5
    pairs = rows[:, 0] * 1000 + rows[:, 1]
    assert len(pairs.unique()) > 45_000  # 48,770 of random ones


def test_the_largest_ids_do_not_overflow() -> None:
    layer = UnifiedReader(PRIME - 1, 2, 97, 1, feature=0, seed=3)
    a, b = hash_of(3, 0, 0)
    ids = torch.tensor([0, 1, PRIME - 2])
    want = [(a * int(i) + b) % PRIME % 97 for i in ids]
    assert layer.hashed(ids).flatten().tolist() == want
    assert layer.hashed(ids.int()).flatten().tolist() == want
    with pytest.raises(LowrankError, match="ids are hashed below"):
        UnifiedReader(PRIME, 2, 97, 1, feature=0, seed=3)


@pytest.mark.parametrize("id", [11, -1])
def test_an_id_that_the_feature_does_not_have_is_refused(id: int) -> None:
    with pytest.raises(IndexError):
        pair()[1](torch.tensor([id]))


def test_described_and_built() -> None:
    first, reader = pair(padding_idx=2, mode="sum", include_last_offset=True)
    specs = [json.loads(json.dumps(describe(layer))) for layer in (first, reader)]
    owner, again = (build(spec, "here") for spec in specs)
    assert [list(layer.state_dict()) for layer in (owner, again)] == [["shared.weight"], []]
    owner.load_state_dict(first.state_dict(), assign=True)
    with pytest.raises(LowrankError, match="never bound"):
        again(IDS[0], torch.tensor([0, 5]))
    again.bind(owner)
    offsets = torch.tensor([0, 2, 5])
    assert torch.equal(again(IDS[0], offsets), reader(IDS[0], offsets))
    assert first.cost().params == 26
    assert reader.cost().bytes == 0


def test_sparse_gradients_stay_sparse() -> None:
    first = UnifiedEmbedding(20, 4, 13, 2, feature=0, seed=7, sparse=True)
    first.set_table(torch.ones(13, 2))
    reader = UnifiedReader(11, 6, 13, 3, feature=1, seed=7, sparse=True).bind(first)
    (first(IDS).sum() + reader(IDS).sum()).backward()
    assert first.shared.weight.grad.is_sparse


def test_what_does_not_fit_is_refused() -> None:
    first, _ = pair()
    with pytest.raises(LowrankError, match=r"a table \(13, 3\) cannot share .*, \(13, 2\)"):
        UnifiedReader(11, 6, 13, 2, feature=1, seed=7).bind(first)
    with pytest.raises(LowrankError, match="cannot share that of Linear, None"):
        UnifiedReader(11, 6, 13, 2, feature=1, seed=7).bind(nn.Linear(2, 2))
    with pytest.raises(LowrankError, match=r"expected a table \(13, 2\)"):
        first.set_table(torch.ones(12, 2))
    with pytest.raises(TypeError, match="for an EmbeddingBag"):
        first(IDS[0], torch.tensor([0]))
    for rows, lookups in ((0, 2), (13, 0), (13, 3)):
        with pytest.raises(LowrankError, match="lookups divide the width 4"):
            build({**describe(first), "rows": rows, "lookups": lookups}, "here")
