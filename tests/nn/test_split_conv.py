"""Grouped and transposed convolutions from layers against torch's own, in 1 to 3 dimensions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.nn import LowRankLinear
from lowrank.nn.splits import split_module

CONVS: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SPACE = (6, 5, 7)
GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"stride": 3, "padding": 2, "dilation": 2, "output_padding": 1, "groups": 2},
    {"stride": 2, "groups": 2, "bias": False},
]


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_transposed_equals_torch(dims: int, geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole = TRANSPOSED[dims - 1](12, 8, 3, **geometry)
    split: Any = copy.deepcopy(whole)
    split_module(split)
    x = torch.randn(2, 12, *SPACE[:dims])
    _close(split(x), whole(x))
    _close(split(x[0]), whole(x[0]))
    if geometry.get("stride", 1) > 1:
        extra = geometry.get("output_padding", 0)  # the smallest size, and the largest
        size = [side - extra + geometry["stride"] - 1 for side in whole(x).shape[2:]]
        _close(split(x, output_size=size), whole(x, output_size=size))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_factored_it_is_a_transposed_convolution_of_fewer_channels(dims: int) -> None:
    torch.manual_seed(0)
    whole = TRANSPOSED[dims - 1](12, 8, 3, stride=2, padding=1, output_padding=1)
    rank = 4
    left, right = torch.randn(8 * 3**dims, rank), torch.randn(rank, 12)
    with torch.no_grad():
        whole.weight.copy_((left @ right).T.reshape(whole.weight.shape))
    split: Any = copy.deepcopy(whole)
    split_module(split)
    layer = LowRankLinear.from_factors(right, left, None)
    split._modules["0"] = layer
    x = torch.randn(2, 12, *SPACE[:dims])
    _close(split(x), whole(x))
    layer.register_forward_hook(lambda *_: None)  # then it is called as a whole
    _close(split(x), whole(x))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_grouped_equals_torch(dims: int, mode: str) -> None:
    torch.manual_seed(0)
    options = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": mode}
    whole = CONVS[dims - 1](12, 24, 3, **options)
    split: Any = copy.deepcopy(whole)
    split_module(split)
    x = torch.randn(2, 12, *SPACE[:dims])
    _close(split(x), whole(x))
    _close(split(x[0]), whole(x[0]))


def test_gradients_reach_the_layers() -> None:
    for make in (
        lambda: nn.ConvTranspose2d(12, 8, 3, stride=2),
        lambda: nn.Conv2d(12, 24, 3, groups=2),
    ):
        torch.manual_seed(0)
        whole = make()
        split: Any = copy.deepcopy(whole)
        split_module(split)
        x = torch.randn(2, 12, 6, 5)
        for module in (whole, split):
            module(x).square().sum().backward()
        rows = [split.closed(split, layer.weight.grad) for layer in split.layers().values()]
        _close(torch.cat(rows), whole.weight.grad)
