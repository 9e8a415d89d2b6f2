"""One line of a plan: costs that follow from ranks, and what a hand-written one may not say."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.nn import LowRankLinear, PivotedLinear
from lowrank.plans.entry import Entry, break_even, check_rank, relative
from lowrank.types import Cost
from lowrank.walk.layouts import dense_cost
from tests.zoo import said

DENSE = Cost(64 * 128, 64 * 128 * 2, 64 * 128)
ENTRY = Entry(
    sites=("a.fc", "b.fc"), shape=(64, 128), dense=DENSE, method="svd", size=(10,),
    storage="factors", cost=Cost(1920, 3840, 1920), error=4.0, total=16.0, norm="weight",
    target=True, rcond=0.1,
)  # fmt: skip
KEPT = ENTRY.left_dense("in exclude_modules")
PIVOTED = replace(ENTRY, storage="pivoted")


def as_json(entry: Entry = ENTRY, **changes: Any) -> Any:
    return {**json.loads(json.dumps(asdict(entry))), **changes}


def without(key: str) -> Any:
    item = as_json()
    del item[key]
    return item


def test_names() -> None:
    assert (ENTRY.name, ENTRY.title) == ("a.fc", "a.fc")
    assert replace(ENTRY, sites=("",)).title == "(root)"


def test_a_rank_is_priced_as_the_module_that_it_becomes() -> None:
    dense = nn.Linear(128, 64).bfloat16()
    entry = replace(ENTRY, dense=dense_cost(dense)).with_size(7, "whitened")
    assert entry.cost == LowRankLinear(128, 64, 7).bfloat16().cost()
    assert (entry.size, entry.storage, entry.error) == ((7,), "factors", None)
    assert entry.method == "svd"  # it was factored before: its method stays
    assert KEPT.with_size(7, "whitened").method == "whitened"
    assert KEPT.with_size(7, "whitened").reason == ""


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pivoted_entries_stay_pivoted_at_their_own_cost(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    dense = dense_cost(nn.Linear(shape[1], shape[0]).to(dtype))
    entry = replace(PIVOTED, shape=shape, dense=dense)
    found = entry.with_size(50, "whitened")
    assert (found.storage, found.method, found.size) == ("pivoted", "svd", (50,))
    layer = PivotedLinear.from_factors(torch.ones(50, shape[1]), torch.ones(shape[0], 50), None)
    assert found.cost == layer.to(dtype).cost()
    assert found.row()["method"] == "svd, pivoted"
    assert found.left_dense("why").row()["method"] == "dense"
    kept = entry.left_dense("why")
    assert kept.with_size(7, "whitened", "pivoted").storage == "pivoted"
    assert kept.with_size(7, "whitened").storage == "factors"
    table = replace(entry, kind="embedding", storage="dense")
    assert table.with_size(7, "frequency", "pivoted").storage == "factors"
    assert replace(entry, storage="factors").with_size(7, "svd", "pivoted").storage == "factors"


def test_left_dense() -> None:
    assert (KEPT.size, KEPT.cost, KEPT.error, KEPT.storage) == (None, DENSE, 0.0, "dense")
    assert KEPT.reason == "in exclude_modules"


def test_the_option_of_an_entry() -> None:
    assert ENTRY.option().error == 4.0
    assert ENTRY.with_size(7, "svd").option().error == 0.0  # unknown
    assert KEPT.option().dense


@pytest.mark.parametrize(
    ("shape", "even"),
    [((768, 768), 384), ((768, 3072), 615), ((11008, 4096), 2986), ((1, 9), 1), ((64, 32), 22)],
)
def test_break_even_is_the_least_rank_that_is_not_smaller(
    shape: tuple[int, int], even: int
) -> None:
    """The figures of Greenformer's r_max, which is the largest rank that is not larger."""
    assert break_even(shape) == even
    numbers = math.prod(shape)
    assert even * sum(shape) >= numbers
    assert (even - 1) * sum(shape) < numbers


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (40, 24), (3, 3), (1, 9), (2, 2), (2, 9)])
@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_pivoted_break_even_counts_numbers_and_indices(
    shape: tuple[int, int], itemsize: int
) -> None:
    """All ranks tried: (m − r)(n − r) numbers are saved, min(m, n) indices of 4 bytes added."""
    out_features, in_features = shape
    saved = [
        (out_features - rank) * (in_features - rank) * itemsize - 4 * min(shape)
        for rank in range(min(shape))
    ]
    smaller = [rank for rank, bytes_saved in enumerate(saved) if rank and bytes_saved > 0]
    assert break_even(shape, "pivoted", itemsize) == max(smaller, default=0) + 1


@pytest.mark.parametrize("rank", [1, 42])
def test_ranks_that_exist(rank: int) -> None:
    check_rank("a", (64, 128), rank)


@pytest.mark.parametrize("rank", [0, -1, 43, 64, 65, 96, 2.5, "8", True, None])
def test_ranks_that_do_not(rank: Any) -> None:
    with pytest.raises(LowrankError) as caught:
        check_rank("model.layers.0.q_proj", (64, 128), rank)
    assert said(caught) == (
        f"rank must be in [1, 64] for model.layers.0.q_proj of shape (64, 128), got {rank!r}; "
        "from 43 on a factored layer is not smaller than the dense one"
    )


def test_ranks_of_pivoted_layers_go_further() -> None:
    check_rank("a", (64, 128), 62, "pivoted", 2)
    with pytest.raises(LowrankError, match="from 63 on a pivoted layer is not smaller"):
        check_rank("a", (64, 128), 63, "pivoted", 2)
    check_rank("a", (64, 128), 63, "pivoted", 4)
    assert Entry.from_json(as_json(PIVOTED, size=[62]), "svd") == PIVOTED.with_size(62, "svd")
    with pytest.raises(LowrankError, match=r"rank must be in \[1, 64\] for a.fc"):
        Entry.from_json(as_json(PIVOTED, size=[64]), "svd")


def test_relative_errors() -> None:
    assert relative(4.0, 16.0) == "0.5000"
    assert relative(0.0, 0.0) == "0.0000"
    assert relative(None, 16.0) == relative(4.0, None) == ""


def test_rows_show_what_people_want_to_know() -> None:
    assert ENTRY.row() == {
        "site": "a.fc", "shape": "64x128", "method": "svd", "rank": "10", "kept": "0.234",
        "error": "0.5000", "reason": "",
    }  # fmt: skip
    assert KEPT.row()["rank"] == ""


# From JSON


@pytest.mark.parametrize(
    "entry", [ENTRY, KEPT, ENTRY.with_size(3, "svd"), PIVOTED.with_size(60, "svd")]
)
def test_json_round_trip(entry: Entry) -> None:
    assert Entry.from_json(as_json(entry), "whitened") == entry


def test_other_storages_are_taken_as_they_are() -> None:
    entry = replace(ENTRY, storage="own", size=(10, 3), cost=Cost(5, 6, 7))
    assert Entry.from_json(as_json(entry), "svd") == entry


def test_an_edited_size_brings_its_cost_up_to_date() -> None:
    assert Entry.from_json(as_json(size=[7]), "svd") == ENTRY.with_size(7, "svd")
    assert Entry.from_json(as_json(KEPT, size=[7]), "whitened") == KEPT.with_size(7, "whitened")
    dense = Entry.from_json(as_json(size=None), "svd")
    assert dense == ENTRY.left_dense("left dense by hand")


NONSENSE = {
    "no object": (5, "must be an object, got 5"),
    "no size": (without("size"), "missing field 'size'"),
    "spare": (as_json(ranks=3), "unknown field 'ranks'"),
    "rank too large": (as_json(size=[43]), "rank must be in [1, 64] for a.fc"),
    "rank zero": (as_json(size=[0]), "got 0"),
    "two ranks": (as_json(size=[3, 4]), "got (3, 4)"),
    "no rank": (as_json(size=[]), "size must be a list"),
    "text": (as_json(size="8"), "size must be a list of integers >= 0, or null, got '8'"),
    "fraction": (as_json(size=[2.5]), "size must be"),
    "bool": (as_json(size=[True]), "size must be"),
    "names": (as_json(sites=[]), "sites must be a list of names"),
    "name": (as_json(sites="a"), "sites must be a list of names"),
    "shape": (as_json(shape=[64]), "shape must be two integers"),
    "shape text": (as_json(shape="64x128"), "shape must be two integers"),
    "negative": (as_json(cost={"params": -1, "bytes": 1, "macs": 1}), "cost must be params"),
    "half a cost": (as_json(dense={"params": 1}), "dense must be params"),
    "error": (as_json(error="small"), "error must be a number >= 0 or null"),
    "NaN": (as_json(error=math.nan), "error must be a number"),
    "method": (as_json(method=None), "method must be text"),
    "target": (as_json(target=1), "target must be true or false"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_told_with_the_site(name: str) -> None:
    item, words = NONSENSE[name]
    with pytest.raises(LowrankError) as caught:
        Entry.from_json(item, "svd")
    message = said(caught)
    assert words in message
    if isinstance(item, dict) and item.get("sites"):
        assert "a" in message
