"""What is asked for: numbers of any library, words, and combinations that contradict."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from torch import nn

from lowrank import LowrankError
from lowrank.api.deciding import targets_among
from lowrank.api.request import Request
from lowrank.measure.size import model_cost
from lowrank.nn import LowRankLinear
from lowrank.walk import sites
from lowrank.walk.sites import find_sites
from tests.zoo import make, mlp, said


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"ratio": np.float64(0.5)}, 0.5),
        ({"ratio": np.float32(0.5)}, 0.5),
        ({"ratio": Fraction(1, 2)}, 0.5),
        ({"rank": np.int64(3)}, 3),
        ({"rank": np.float32(0.5)}, 0.5),
        ({"rank": 1}, 1),
        ({"rank": 1.0}, 1.0),
        ({"rank_pattern": {"a": np.int32(3), "b": 0.5}}, {"a": 3, "b": 0.5}),
    ],
)
def test_numbers_become_pythons_own(given: dict[str, Any], kept: Any) -> None:
    (name,) = given
    got = getattr(Request(**given), name)
    assert repr(got) == repr(kept)
    assert Request(**given).asked()[name] == kept


def test_one_as_a_rank_and_one_as_a_share_differ() -> None:
    """As in peft: 1 is rank one, 1.0 is all the energy."""
    assert isinstance(Request(rank=1).rank, int)
    assert isinstance(Request(rank=1.0).rank, float)


def test_seeds_become_pythons_own() -> None:
    assert repr(Request(ratio=0.5, seed=np.int64(7)).seed) == "7"


@pytest.mark.parametrize("align", [None, 1, 4])
def test_a_rank_may_be_a_multiple_of_align(align: int | None) -> None:
    assert Request(rank=8, align=align).rank == 8


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 10, "align": 8}, "rank=10 is not a multiple of align=8"),
        ({"rank": 4, "policy": "energy"}, "policy divides a ratio among the layers"),
        ({"rank_pattern": {"a": 4}, "policy": "energy"}, "policy divides a ratio among the layers"),
        ({"ratio": 0.5, "seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"ratio": 0.5, "seed": True}, "seed must be an integer, got True"),
        ({"ratio": 0.5, "rank_pattern": [("a", 4)]}, "rank_pattern must map names to ranks"),
        ({"ratio": 0.5, "rank_pattern": {3: 4}}, "rank_pattern must map names to ranks"),
    ],
    ids=str,
)
def test_contradictions_are_told(given: dict[str, Any], words: str) -> None:
    with pytest.raises(LowrankError) as caught:
        Request(**given)
    assert words in said(caught)


def test_targets_are_the_sites_without_a_reason() -> None:
    model = make("llama")
    found = targets_among(find_sites(model), model, Request(ratio=0.5, target_modules=["q_proj"]))
    assert len(found) == 16  # all that were considered
    assert sum(not site.reason for site in found) == 2


def test_the_cost_of_a_model_counts_each_tensor_once() -> None:
    model = make("gpt2")  # the head is tied to the embedding
    cost = model_cost(model, sites.find_sites(model))
    assert cost.params == sum(p.numel() for p in model.parameters()) == model.num_parameters()
    assert cost.bytes == 4 * cost.params
    half = make("gpt2").bfloat16()
    half.transformer.ln_f.float()
    norm = sum(p.numel() for p in half.transformer.ln_f.parameters())
    assert model_cost(half, []).bytes == 2 * cost.params + 2 * norm


def test_macs_are_those_of_linear_layers_factored_ones_too() -> None:
    model = nn.Sequential(nn.Linear(8, 4), LowRankLinear(4, 6, 2), nn.LayerNorm(6))
    assert model_cost(model, sites.find_sites(model)).macs == 8 * 4 + 2 * (4 + 6)
    assert model_cost(mlp(3, 5), sites.find_sites(mlp(3, 5))).macs == 15
