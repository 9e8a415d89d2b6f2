"""Bags of vectors: torch's own bags of rows beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank.errors import LowrankError
from lowrank.nn.table_form import Bag

IDS = torch.tensor([1, 3, 5, 5, 2, 9, 0, 3])
PLACES: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {
    "offsets": (IDS, torch.tensor([0, 3, 3, 6])),
    "rows": (IDS.view(2, 4), None),
    "none": (IDS[:0], torch.tensor([0, 0])),
    "int32": (IDS.int(), torch.tensor([0, 5]).int()),
}


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("place", PLACES)
def test_it_pools_as_torch_does(place: str, mode: str, padding_idx: int | None) -> None:
    ids, offsets = PLACES[place]
    torch.manual_seed(0)
    dense = nn.EmbeddingBag(11, 7, mode=mode, padding_idx=padding_idx).double()
    rows = dense.weight.detach().clone().requires_grad_()
    bag = Bag.of({"mode": mode})
    assert bag is not None
    got = bag.pool(rows[ids], ids, offsets, None, padding_idx)
    want = dense(ids, offsets)
    torch.testing.assert_close(got, want)
    got.sin().sum().backward()
    want.sin().sum().backward()
    torch.testing.assert_close(rows.grad, dense.weight.grad)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_weights_and_a_last_offset(padding_idx: int | None) -> None:
    options: dict[str, Any] = {"mode": "sum", "include_last_offset": True}
    dense = nn.EmbeddingBag(11, 7, padding_idx=padding_idx, **options)
    offsets, weights = torch.tensor([0, 2, 8]), torch.rand(8, requires_grad=True)
    bag = Bag.of(options)
    assert bag is not None
    assert bag.options() == options
    got = bag.pool(dense.weight[IDS], IDS, offsets, weights, padding_idx)
    want = dense(IDS, offsets, weights)
    torch.testing.assert_close(got, want)
    slopes = [torch.autograd.grad(y.sin().sum(), weights)[0] for y in (got, want)]
    torch.testing.assert_close(*slopes)


def test_what_is_no_bag_is_refused() -> None:
    assert Bag.of({}) is None
    with pytest.raises(LowrankError, match="sum, mean, max, got 'median'"):
        Bag("median")
    for options in ({"include_last_offset": True}, {"mode": "sum", "colour": 1}):
        with pytest.raises(TypeError):
            Bag.of(options)
