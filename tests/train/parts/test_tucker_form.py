"""1×1, k×k, 1×1 is the convolution that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank.linalg import modes
from lowrank.train.parts.tucker_form import TuckerForm

OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    {"kernel_size": (3, 5), "padding": "same"},
    {"kernel_size": 3, "bias": False},
]


def form(dense: Any, ranks: tuple[int, int]) -> TuckerForm:
    (u0, u1), core = modes.hosvd(dense.weight, ranks)
    return TuckerForm.of(dense, u0, core, u1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_at_full_rank_it_is_the_convolution(options: dict[str, Any]) -> None:
    """T7: stride, padding, dilation, with and without bias."""
    dense = nn.Conv2d(5, 6, **options).double()
    x = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    made = form(dense, (6, 5))
    torch.testing.assert_close(made(x), dense(x))
    assert made.bias is dense.bias
    back = made.dense()
    torch.testing.assert_close(back(x), dense(x))
    assert type(back) is nn.Conv2d
    assert repr(back) == repr(dense)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv3d])
def test_one_and_three_dimensions(conv: Any) -> None:
    dense = conv(4, 5, 3, padding=1).double()
    x = torch.randn(2, 4, *(6,) * (dense.weight.ndim - 2), dtype=torch.float64)
    made = form(dense, (5, 4))
    torch.testing.assert_close(made(x), dense(x))
    small = form(dense, (2, 3))
    kernel = small.dense_weight()
    assert kernel.shape == dense.weight.shape
    dense.weight.data.copy_(kernel)
    torch.testing.assert_close(small(x), dense(x))


def test_it_costs_what_it_stores() -> None:
    made = form(nn.Conv2d(5, 6, 3), (4, 2))
    assert made.rank == (4, 2)
    held = [p.numel() for name, p in made.named_parameters() if not name.endswith("bias")]
    assert made.cost().params == sum(held) == 6 * 4 + 5 * 2 + 4 * 2 * 9
