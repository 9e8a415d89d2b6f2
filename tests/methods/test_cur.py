"""CUR as a method: what is stored is the weight's own, bit for bit; its options; its files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.methods import CUR, SVD, WhitenedCUR
from lowrank.methods.cur import largest_rank
from lowrank.nn import CURLinear
from lowrank.types import Cost, Option, Statistics

from .layers import at_rank, inputs, linear, output_error, site, statistics, weight_error


def places(parts: Tensor, rows: Tensor) -> list[int]:
    """Which of the rows each of the parts equals, bit for bit."""
    return [int((rows == part).all(1).nonzero()[0, 0]) for part in parts]


@pytest.mark.parametrize("method", [CUR(), WhitenedCUR(), CUR(choice="leverage")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_and_columns_are_the_weights_own(method: CUR, dtype: torch.dtype) -> None:
    layer, stats = linear(24, 30).to(dtype), statistics(inputs(30))
    option = at_rank(method.curve(site(layer), stats), 7)
    new = method.factor(layer, option, stats)
    assert isinstance(new, CURLinear)
    assert len(set(places(new.down.weight, layer.weight))) == 7
    assert len(set(places(new.up.weight.T, layer.weight.T))) == 7
    assert new.cost() == option.cost


def test_the_choice_and_the_statistics_are_used() -> None:
    layer, rows = linear(24, 30), inputs(30)
    stats, found = statistics(rows), {}
    for method in (CUR(), CUR(choice="leverage"), WhitenedCUR()):
        new = method.factor(layer, at_rank(CUR().curve(site(layer), stats), 7), stats)
        found[method] = weight_error(layer, new), output_error(layer, new, rows)
    assert len(set(found.values())) == 3
    plain, whitened = found[CUR()], found[WhitenedCUR()]
    assert plain[0] < whitened[0]
    assert whitened[1] < plain[1]


def test_never_nearer_than_the_svd_of_equal_numbers() -> None:
    layer = linear(24, 30)
    near, best = (m.curve(site(layer), Statistics()).options[:-1] for m in (CUR(), SVD()))
    assert len(near) == largest_rank(24, 30) == 11
    for option in near:
        assert option.error > min(o.error for o in best if o.cost.params <= option.cost.params)


@pytest.mark.parametrize(("shape", "rank"), [((2, 2), 1), ((1, 9), 1), ((64, 64), 26)])
def test_ranks_end_where_nothing_is_saved(shape: tuple[int, int], rank: int) -> None:
    assert largest_rank(*shape) == rank
    layer = linear(*shape)
    options = CUR().curve(site(layer), Statistics()).options
    assert all(option.cost.params < layer.weight.numel() for option in options[:-1])


def test_a_weight_near_the_least_number_does_not_overflow() -> None:
    layer = linear(24, 30).float()
    with torch.no_grad():
        layer.weight *= 1e-40
    new = CUR().factor(layer, at_rank(CUR().curve(site(layer), Statistics()), 7), Statistics())
    assert all(bool(p.isfinite().all()) for p in new.parameters())
    dense, near = layer.weight.detach().double(), new.dense_weight(torch.float64).detach()
    assert float((dense - near).norm()) < float(dense.norm())


def test_odd_requests_are_refused() -> None:
    with pytest.raises(LowrankError, match="unknown choice 'pivots'; did you mean 'pivoted'"):
        CUR(choice="pivots")  # type: ignore[arg-type]
    with pytest.raises(LowrankError, match=r"rank must be in \[1, 6\] for shape \(6, 8\)"):
        CUR().factor(linear(6, 8), Option("", (7,), "cur", Cost(0, 0, 0), 0.0), Statistics())


def test_from_one_line_to_the_file_and_back(tmp_path: Path) -> None:
    """An effort leaves rows and columns as they are; a plan's sizes can be edited."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 17)).eval()
    rows = torch.randn(64, 20)
    small, report = lowrank.compress(
        net, 0.7, method="whitened-cur", data=rows, effort="fast", policy="uniform", copy=True,
        target_modules="all", progress=False,
    )  # fmt: skip
    assert {entry.storage for entry in report.plan.entries} == {"cur"}
    for layer, old in zip((small[0], small[2]), (net[0], net[2]), strict=True):
        assert len(set(places(layer.down.weight, old.weight))) == layer.rank
    lowrank.save(small, tmp_path)
    with torch.no_grad():
        assert torch.equal(lowrank.load(tmp_path, copy.deepcopy(net))(rows), small(rows))
    edited = report.plan.edit({"2": 4})
    again, _ = lowrank.apply(net, edited, data=rows, copy=True, progress=False)
    assert again[2].rank == 4
    assert type(lowrank.to_dense(again)[2]) is nn.Linear
