"""The intrinsic dimension of a planted task is found, with the curve and the rates."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lowrank import LowrankError
from lowrank.train import intrinsic_dimension
from lowrank.train.intrinsic import IntrinsicDimension, Point

GENERATOR = torch.Generator().manual_seed(0)
TARGET = torch.randn(200, generator=GENERATOR)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.zeros(1, 200))


def loss(model: nn.Module, step: int) -> Tensor:
    """Ten equations for two hundred numbers: ten directions solve them, whichever they are."""
    parts: Tensor = model.numbers.view(10, 20).sum(1) - TARGET.view(10, 20).sum(1)  # type: ignore[operator,union-attr]
    return parts.square().mean()


def score(model: nn.Module) -> float:
    return 1 / (1 + float(loss(model, 0)))


FOUND = partial(
    intrinsic_dimension, Table(), loss, score, seeds=(0, 1), rates=(1e-9, 0.3), full_rates=(0.1,),
    steps=100, progress=False,
)  # fmt: skip


def test_as_many_directions_as_equations_solve_a_task() -> None:
    found = FOUND(dimensions=(40, 5, 20), bisections=1)
    assert [p.dimension for p in found.curve] == [5, 10, 20, 40]
    assert found.reached is not None
    assert 8 <= found.reached <= 20
    assert found.full.score > 0.99
    assert {p.rate for p in found.curve} == {0.3}
    assert all(len(p.scores) == 2 for p in found.curve)
    body = json.loads(found.to_json())
    assert body["reached"] == found.reached
    assert f"{found.reached} of 200 (dense)" in str(found)


def test_the_least_dimension_that_reaches_the_share_counts() -> None:
    curve = tuple(Point(d, (s, s), 0.1) for d, s in ((1, 0.2), (10, 0.85), (100, 0.91)))
    full = Point(1000, (1.0,), 0.1)
    assert IntrinsicDimension(curve, full, 0.9, "dense").reached == 100
    assert IntrinsicDimension(curve, full, 0.8, "dense").reached == 10
    assert IntrinsicDimension(curve, full, 0.95, "dense").reached is None
    rows = IntrinsicDimension(curve, full, 0.8, "dense").rows()
    assert [row["reached"] for row in rows] == ["", "yes", "yes", "yes"]
    assert rows[-1]["dimension"] == "1,000 (full)"


def test_options_out_of_range_are_refused() -> None:
    for options, words in (
        ({"dimensions": ()}, "dimensions must hold at least one"),
        ({"dimensions": (3,), "seeds": ()}, "seeds must hold at least one"),
        ({"dimensions": (3,), "steps": 0}, "steps must be at least 1"),
        ({"dimensions": (3,), "share": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"dimensions": (201,), "steps": 1}, r"dimension must be in \[1, 200\]"),
    ):
        with pytest.raises(LowrankError, match=words):
            FOUND(**options)
