"""The rows that MLPs read: a sample of all calls, without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank.calibration.mlp_inputs import rows_of_mlps
from lowrank.errors import LowrankError
from lowrank.walk.mlps import MLP, find_mlps

from ..zoo import inputs_of, make, mlp, tokens

IDS = torch.cat([tokens(2, 9), tokens(2, 9, start=3)])


def found(model: Any) -> list[MLP]:
    with torch.no_grad():
        return find_mlps(model, lambda: model(IDS))[0]


def test_all_rows_are_taken_where_they_are_few() -> None:
    model = make("llama")
    mlps = found(model)
    rows = rows_of_mlps(model, mlps, [IDS[:2], IDS[2:]], most=100)
    names = [each.name for each in mlps]
    want = inputs_of(model, names, lambda: (model(IDS[:2]), model(IDS[2:])))
    for name in names:
        torch.testing.assert_close(rows[name].double(), torch.from_numpy(want[name]))


def test_more_are_thinned_the_same_by_seed_from_every_batch() -> None:
    model = make("llama")
    mlps = found(model)
    batches: Any = [IDS[:2], IDS[2:]]
    one, other, third = (rows_of_mlps(model, mlps, batches, most=10, seed=s) for s in (0, 0, 1))
    for name, rows in one.items():
        assert len(rows) == 10
        assert torch.equal(rows, other[name])
    assert not all(torch.equal(rows, third[name]) for name, rows in one.items())

    def run(model: Any) -> None:
        for _ in range(5):
            model(IDS)

    assert all(len(rows) == 10 for rows in rows_of_mlps(model, mlps, run, most=10).values())


def test_padding_is_left_out() -> None:
    model = make("llama")
    mask = torch.ones_like(IDS)
    mask[:, :4] = 0
    rows = rows_of_mlps(model, found(model), [{"input_ids": IDS, "attention_mask": mask}], most=100)
    assert {len(each) for each in rows.values()} == {int(mask.sum())}


def test_numbers_that_are_none_are_refused() -> None:
    net = mlp(4, 6, 2)
    with torch.no_grad():
        mlps = find_mlps(net, lambda: net(torch.randn(3, 4)))[0]
    with pytest.raises(LowrankError, match=r"\(root\): its input holds NaN or Inf"):
        rows_of_mlps(net, mlps, [torch.full((3, 4), torch.nan)], most=10)
