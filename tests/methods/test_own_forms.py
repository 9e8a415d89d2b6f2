"""Dense-sparse, low rank with channels, and blocks, as methods: what their curves say and keep."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from lowrank.errors import LowrankError
from lowrank.methods import (
    Auto,
    Blast,
    DenseSparse,
    LowRankSparse,
    Whitened,
    own_form,
    stored_as,
)
from lowrank.nn import BlastLinear, DenseSparseLinear, LowRankSparseLinear
from lowrank.types import Cost, Option, Statistics

from .layers import inputs, linear, output_error, site, statistics

WAYS = [
    (DenseSparse(), DenseSparseLinear),
    (LowRankSparse(), LowRankSparseLinear),
    (Blast(sweeps=60), BlastLinear),
]
NAMES = ["dense-sparse", "lowrank-sparse", "blast"]


@pytest.mark.parametrize(("way", "kind"), WAYS, ids=NAMES)
def test_predictions_are_near_what_the_layers_show(way: Any, kind: type) -> None:
    """Measured by running both layers on the calibration's own inputs; more effort than the curve
    had may only help."""
    layer, rows = linear(36, 48), inputs(48)
    stats = statistics(rows)
    curve = way.curve(site(layer), stats)
    assert not curve.exact
    options = [option for option in curve.options if not option.dense]
    assert len(options) > 8
    assert len({option.size for option in options}) == len(options)
    for option in (options[len(options) // 4], options[len(options) // 2], options[-1]):
        new = way.factor(layer, option, stats)
        assert type(new) is kind
        assert new.cost() == option.cost
        measured = output_error(layer, new, rows)
        assert 0.3 * option.error <= measured <= 1.3 * option.error
        if kind is LowRankSparseLinear:  # its curve is a bound
            assert measured <= option.error * (1 + 1e-6)
    costs = [option.cost.bytes for option in options]
    steps = [after - before for before, after in pairwise(costs)]
    assert sorted(steps)[-3] <= 0.09 * curve.dense.cost.bytes  # fine enough for any budget


def test_rows_from_many_subspaces_suit_dense_sparse() -> None:
    """At equal bytes it is nearer than whitened low rank where rows use few of many atoms."""
    rng = torch.Generator().manual_seed(0)
    layer = linear(128, 48)
    rows = torch.randn(300, 48, generator=rng, dtype=torch.float64)
    basis = torch.randn(24, 48, generator=rng, dtype=torch.float64)
    code = torch.zeros(128, 24, dtype=torch.float64)
    for row in code:
        row[torch.randperm(24, generator=rng)[:4]] = torch.randn(4, generator=rng).double()
    with torch.no_grad():
        layer.weight.copy_(code @ basis)
    stats, errors = statistics(rows), {}
    for way in (DenseSparse(), Whitened()):
        curve = way.curve(site(layer), stats)
        limit = curve.dense.cost.bytes // 2
        best = [o for o in curve.options if o.cost.bytes <= limit][-1]
        errors[type(way)] = output_error(layer, way.factor(layer, best, stats), rows)
    assert errors[DenseSparse] < 0.5 * errors[Whitened]


def test_inputs_that_stand_out_suit_channels() -> None:
    """A weight of rank four and three channels of its own: the size (4, 3) loses nothing."""
    rng = torch.Generator().manual_seed(0)
    layer, rows = linear(40, 30), inputs(30)
    weight = torch.randn(40, 4, generator=rng) @ torch.randn(4, 30, generator=rng)
    weight[:, [3, 17, 22]] += torch.randn(40, 3, generator=rng)
    with torch.no_grad():
        layer.weight.copy_(weight.double())
    stats, way = statistics(rows), LowRankSparse(rounds=20)
    option = Option("lowrank-sparse", (4, 3), "lowrank-sparse", Cost(0, 0, 0), 0.0)
    new = way.factor(layer, option, stats)
    assert new.sparse.index.tolist() == [3, 17, 22]
    assert output_error(layer, new, rows) < 1e-9


def test_options_are_used() -> None:
    layer, stats = linear(30, 40), statistics(inputs(40))
    sizes = {
        density: [o.size for o in DenseSparse(density=density).curve(site(layer), stats).options]
        for density in (0.2, 0.5)
    }
    assert (10, 2) in sizes[0.2]
    assert (10, 5) in sizes[0.5]
    counts = {o.size[1] for o in LowRankSparse(shares=(0.1, 0.3)).curve(site(layer), stats).options
              if o.size}  # fmt: skip
    assert counts <= {4, 12}
    blocks = {o.size[0] for o in Blast(blocks=3, sweeps=2).curve(site(layer), stats).options
              if o.size}  # fmt: skip
    assert blocks == {3}
    for few, many, size in (
        (DenseSparse(sweeps=0), DenseSparse(), (12, 4)),
        (Blast(sweeps=5), Blast(sweeps=100), (4, 9)),
    ):
        option = Option("", size, "", Cost(0, 0, 0), 0.0)
        errors = [
            output_error(layer, way.factor(layer, option, stats), inputs(40)) for way in (few, many)
        ]
        assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DenseSparse(density=0.0), r"density must be in \(0, 1\], got 0.0"),
        (lambda: DenseSparse(density=1.5), "got 1.5"),
        (lambda: DenseSparse(sweeps=-1), "sweeps must be an integer >= 0"),
        (lambda: LowRankSparse(shares=()), "shares must be numbers"),
        (lambda: LowRankSparse(shares=(0.1, 1.0)), "shares must be numbers"),
        (lambda: LowRankSparse(rounds=-1), "rounds must be"),
        (lambda: Blast(blocks=0), "blocks must be an integer >= 1"),
        (lambda: Blast(sweeps=0), "sweeps must be an integer >= 1"),
    ],
)
def test_options_that_are_none_are_refused(make: Any, said: str) -> None:
    with pytest.raises(LowrankError, match=said):
        make()


@pytest.mark.parametrize(
    ("way", "size", "said"),
    [
        (DenseSparse(), (4, 5), "5 coefficients a row need as many atoms"),
        (DenseSparse(), (4,), r"expected a size \(atoms, coefficients in a row\) for shape"),
        (DenseSparse(), None, "got None"),
        (LowRankSparse(), (7, 1), "needs a rank up to 6"),
        (LowRankSparse(), (2, 9), "8 inputs or fewer"),
        (LowRankSparse(), (0, 1), "expected a size"),
        (Blast(), (7, 1), "7 blocks along each side do not fit"),
        (Blast(), (2, 2, 2), "expected a size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(way: Any, size: Any, said: str) -> None:
    option = Option("", size, "", Cost(0, 0, 0), 0.0)
    with pytest.raises(LowrankError, match=said):
        way.factor(linear(6, 8), option, statistics(inputs(8)))
    with pytest.raises(LowrankError, match="expected the gram of an input of width 8, got none"):
        way.curve(site(linear(6, 8)), Statistics())


def test_auto_is_never_farther_than_any_form_by_its_own_curve() -> None:
    layer, stats = linear(36, 48), statistics(inputs(48))
    forms = ("factors", "pivoted", "lowrank-sparse")
    way = Auto(forms=forms)
    curve, rows = way.curve(site(layer), stats), inputs(48)
    parts = [LowRankSparse(), Whitened(), stored_as(Whitened(), "pivoted")]
    for part in parts:
        for option in part.curve(site(layer), stats).options:
            bytes_, params = 1.03 * option.cost.bytes, 1.03 * option.cost.params
            if bytes_ < 0.3 * curve.dense.cost.bytes:
                continue  # of few ranks the order of the features weighs more than it saves
            near = [o for o in curve.options if o.cost.bytes <= bytes_ and o.cost.params <= params]
            assert near[-1].error <= option.error * (1 + 1e-9)
    used = {option.storage for option in curve.options}
    assert used >= {"lowrank-sparse", "pivoted", "dense"}
    for option in curve.options[:-1:9]:
        new = way.factor(layer, option, stats)
        assert new.cost() == option.cost
        assert output_error(layer, new, rows) <= option.error * (1 + 1e-6)


@pytest.mark.parametrize("forms", [(), ("pivot",)])
def test_auto_knows_its_forms(forms: Any) -> None:
    with pytest.raises(LowrankError, match="unknown form"):
        Auto(forms=forms)


def test_which_methods_have_a_form_of_their_own() -> None:
    assert all(own_form(name) for name in NAMES)
    assert own_form(DenseSparse())
    assert not any(own_form(name) for name in ("svd", "basis-sharing", None, "none such"))
    assert not own_form(Whitened())
