"""The words: small frozen values, and contracts that modules can be asked for."""

from __future__ import annotations

import tracemalloc
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import nn

from lowrank.methods import METHODS
from lowrank.nn import LowRankLinear
from lowrank.types import UNITS, Budget, Cost, Curve, Factored, Option, Options, Site, Statistics

COST = Cost(params=3, bytes=12, macs=5)
DENSE = Option("dense", None, "dense", COST, 0.0)
HALF = Option("svd", (2,), "factors", Cost(1, 4, 1), 0.5)


def test_cost_is_read_by_unit_and_added() -> None:
    assert [COST.of(unit) for unit in UNITS] == [3, 12, 5]
    assert COST + Cost(1, 2, 3) == Cost(4, 14, 8)


def test_an_option_without_a_size_is_dense() -> None:
    assert DENSE.dense
    assert not HALF.dense


def test_the_last_option_of_a_curve_is_the_dense_weight() -> None:
    curve = Curve(("a",), (HALF, DENSE), 2.0, None, "weight", True)
    assert curve.dense == DENSE


def test_options_come_back_from_their_arrays_as_they_went_in() -> None:
    sparse = Option("dsf", (3, 7), "dense-sparse", Cost(2, 9, 4), 0.25)
    given = (HALF, sparse, DENSE)
    options = Curve(("a",), given, 2.0, None, "weight", True).options
    assert isinstance(options, Options)
    assert options == given
    assert tuple(options) == given
    assert list(reversed(options)) == [DENSE, sparse, HALF]
    assert (options[-1], options[1:], options[:1]) == (DENSE, (sparse, DENSE), (HALF,))
    assert hash(options) == hash(Options(given))
    with pytest.raises(IndexError):
        options[3]


def test_a_curve_tells_the_costs_and_errors_of_all_its_options() -> None:
    curve = Curve(("a",), [HALF, DENSE], 2.0, None, "weight", True)
    assert [list(curve.costs(unit)) for unit in UNITS] == [[1, 3], [4, 12], [1, 5]]
    assert list(curve.errors) == [0.5, 0.0]


def test_an_option_of_a_curve_takes_a_few_numbers_of_memory() -> None:
    tracemalloc.start()
    try:
        options = (Option("svd", (r,), "factors", Cost(9 * r, 36 * r, 9 * r), 1 / (r + 1))
                   for r in range(10_000))  # fmt: skip
        curve = Curve(("a",), Options(options), 2.0, None, "weight", True)
        assert tracemalloc.get_traced_memory()[0] < 64 * len(curve.options)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [COST, DENSE, Budget(5)])
def test_values_are_frozen(value: object) -> None:
    name = next(iter(value.__dataclass_fields__))
    with pytest.raises(FrozenInstanceError):
        setattr(value, name, 1)


def test_a_budget_counts_parameters_unless_told_otherwise() -> None:
    assert Budget(5) == Budget(5, "params")
    assert Budget(5, "bytes") != Budget(5)


def test_statistics_start_unseen() -> None:
    stats = Statistics()
    assert (stats.count, stats.gram, stats.mean) == (0, None, None)


def test_a_site_is_known_by_its_first_module() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    site = Site("a", ("a", "b"), "linear", (one, other), (2, 2), COST)
    assert site.module is one
    assert site.title == "a"
    assert replace(site, name="").title == "(root)"
    assert site.reason == ""


def test_factored_modules_can_be_told_from_others() -> None:
    layer = LowRankLinear.from_factors(torch.ones(1, 3), torch.ones(2, 1), None)
    assert isinstance(layer, Factored)
    assert not isinstance(nn.Linear(2, 2), Factored)


def test_methods_declare_what_they_take_and_need() -> None:
    for cls in METHODS.values():
        method = cls()
        assert method.kinds <= {"linear", "conv", "embedding", "experts"}
        assert method.kinds
        assert method.needs <= set(Statistics.__dataclass_fields__)
