"""Specs: what a factored module says of itself, and what is built from what a file says."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.errors import LowrankError
from lowrank.nn import (
    FACTORED,
    LAYOUTS,
    LowRankLinear,
    build,
    describe,
    is_factored,
    remember_layout,
)
from lowrank.types import Factored

SPEC = {"type": "LowRankLinear", "in_features": 6, "out_features": 4, "rank": 2, "bias": True}


def small(bias: bool = True) -> LowRankLinear:
    return LowRankLinear.from_factors(
        torch.ones(2, 6), torch.ones(4, 2), torch.ones(4) if bias else None
    )


def test_the_registry_holds_classes_by_their_names() -> None:
    for name, cls in FACTORED.items():
        assert cls.__name__ == name
        assert issubclass(cls, nn.Module)
        assert isinstance(build(SPEC, "x"), Factored)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_described_can_be_built(layout: str, bias: bool) -> None:
    module = small(bias)
    remember_layout(module, layout)
    spec = json.loads(json.dumps(describe(module)))
    again = build(spec, "fc")
    assert type(again) is type(module)
    assert describe(again) == describe(module)
    assert again.layout == layout
    assert all(parameter.is_meta for parameter in again.parameters())
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (module, again)]
    assert shapes[0] == shapes[1]


def test_the_usual_layout_is_not_written_down() -> None:
    assert describe(small()) == SPEC


def test_the_layout_survives_a_copy_and_can_be_set_back() -> None:
    module = small()
    remember_layout(module, "conv1d")
    assert copy.deepcopy(module).layout == "conv1d"
    remember_layout(module, "linear")
    assert describe(module) == SPEC


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(LowrankError, match=r"unknown layout 'conv2d'; did you mean 'conv1d'\?"):
        remember_layout(small(), "conv2d")


def test_only_the_librarys_own_classes_count_as_factored() -> None:
    class Mine(LowRankLinear):
        pass

    assert is_factored(small())
    assert not is_factored(Mine(2, 2, 1))
    assert not is_factored(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("LowRankLinear", "expected a spec with a 'type', got 'LowRankLinear'"),
        ({"in_features": 3}, "expected a spec with a 'type'"),
        ({**SPEC, "type": 3}, "expected a spec with a 'type'"),
        (
            {**SPEC, "type": "LowRankLiner"},
            "did you mean 'LowRankLinear' or 'BlockLowRankLinear'?",
        ),
        ({**SPEC, "layout": "conv2d"}, "did you mean 'conv1d'?"),
        ({**SPEC, "layout": None}, "unknown layout"),
        ({**SPEC, "rank": "2"}, "{'rank': '2'}"),
        ({**SPEC, "rank": 2.0}, "{'rank': 2.0}"),
        ({**SPEC, "rank": -2}, "{'rank': -2}"),
        ({**SPEC, "in_features": None}, "{'in_features': None}"),
        ({**SPEC, "in_features": 2**70}, "cannot be built"),
        ({**SPEC, "in_features": 2**62, "rank": 2**62}, "cannot be built"),
        ({**SPEC, "colour": 1}, "cannot be built"),
        ({k: v for k, v in SPEC.items() if k != "rank"}, "cannot be built"),
    ],
)
def test_a_bad_spec_is_one_clear_error_that_names_the_place(spec: Any, said: str) -> None:
    with pytest.raises(LowrankError) as caught:
        build(spec, "model.layers.3.fc")
    assert "model.layers.3.fc" in str(caught.value)
    assert said in str(caught.value)
