"""One linear layer from several: nn.Linear and transformers' Conv1D, in and out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.nn.split_linear import SplitLinear, split_outputs
from lowrank.nn.unfused import fuse


def _layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        layer: nn.Module = Conv1D(12, 12)  # square: only its class tells how it is stored
        nn.init.normal_(layer.bias)
        return layer
    return nn.Linear(8, 12, bias=kind == "Linear")


@pytest.mark.parametrize("kind", ["Linear", "no bias", "Conv1D"])
def test_the_same_outputs_and_back_the_same_parameters(kind: str) -> None:
    whole = _layer(kind)
    split: Any = copy.deepcopy(whole)
    cls, held = type(split), dict(split.named_parameters())
    x = torch.randn(3, 5, 12 if kind == "Conv1D" else 8)
    before = split_outputs(split, (6, 2, 4))
    torch.testing.assert_close(split(x), whole(x))
    expected = whole.weight.T if kind == "Conv1D" else whole.weight
    torch.testing.assert_close(split.weight + 0, expected)  # models read it for its dtype
    assert split.weight.dtype == whole.weight.dtype
    assert [layer.out_features for layer in split.layers().values()] == [6, 2, 4]
    fuse(split, before)
    assert type(split) is cls
    assert all(split._parameters[name] is p for name, p in held.items())
    assert not {"sizes", "WHOLE"} & vars(split).keys()


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_changed_layers_come_back_as_the_class_stores_them(kind: str) -> None:
    whole = _layer(kind)
    split: Any = copy.deepcopy(whole)
    split_outputs(split, (6, 2, 4))
    for layer in split.layers().values():
        layer.weight = nn.Parameter(3 * layer.weight.detach())
    assert split.spec() == {"sizes": [6, 2, 4]}
    assert isinstance(split, SplitLinear)
    fuse(split, {})
    assert torch.equal(split.weight, 3 * whole.weight)
    assert split.weight.is_contiguous()
