"""Forms sized by several numbers, as methods: what their curves say and keep."""

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
    LowRank24,
    LowRankMasked,
    LowRankSparse,
    Whitened,
)
from lowrank.methods.common import pivoted_curve
from lowrank.methods.resolved import own_form, refitted_form
from lowrank.nn import (
    BlastLinear,
    DenseSparseLinear,
    LowRankMaskedLinear,
    LowRankSparseLinear,
    SparseDenseLinear,
)
from lowrank.types import Cost, Option, Statistics

from .layers import inputs, linear, output_error, site, statistics

WAYS = [
    (DenseSparse(side="out"), DenseSparseLinear),
    (DenseSparse(side="in"), SparseDenseLinear),
    (LowRankSparse(), LowRankSparseLinear),
    (Blast(sweeps=60), BlastLinear),
    (LowRankMasked(), LowRankMaskedLinear),
]
NAMES = ["dense-sparse", "sparse-dense", "lowrank-sparse", "blast", "lowrank-masked"]


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


def test_entries_that_stand_out_suit_a_mask() -> None:
    """A weight of rank two and entries of its own anywhere: found exactly, the mask too."""
    rng = torch.Generator().manual_seed(0)
    layer = linear(40, 30)
    rows = torch.randn(300, 30, generator=rng, dtype=torch.float64)
    mask = torch.rand(40, 30, generator=rng) < 0.04
    weight = torch.randn(40, 2, generator=rng) @ torch.randn(2, 30, generator=rng)
    with torch.no_grad():
        layer.weight.copy_(weight.double() + 5 * mask)
    stats, way = statistics(rows), LowRankMasked(iterations=300)
    new = way.factor(layer, Option("", (2, int(mask.sum())), "", Cost(0, 0, 0), 0.0), stats)
    found = new.sparse.dense() != 0
    assert torch.equal(found, mask)
    assert output_error(layer, new, rows) < 1e-6 * float(rows.square().sum(1).mean())


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 5)])
def test_n_of_each_m_are_kept_whatever_the_rank(pattern: tuple[int, int]) -> None:
    """The last group of a row may be shorter; a plan's method says the pattern."""
    layer, stats, (n, m) = linear(12, 18), statistics(inputs(18)), pattern
    way = LowRankMasked(pattern=pattern)
    curve = way.curve(site(layer), stats)
    options = [option for option in curve.options if option.size]
    last = -(-n * (18 % m) // m)
    assert {option.size[1] for option in options} == {12 * (n * (18 // m) + last)}
    assert [option.size[0] for option in options] == [*range(1, len(options) + 1)]
    assert {option.method for option in options} == {f"lowrank-{n}:{m}"}
    for option in options[::4]:
        mask = way.factor(layer, option, stats).sparse.dense() != 0
        for start in range(0, 18, m):
            group = mask[:, start : start + m]
            most = n if group.shape[1] == m else last
            assert bool((group.sum(1) == most).all())


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
        (DenseSparse(iterations=0), DenseSparse(), (12, 4)),
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
        (lambda: DenseSparse(iterations=-1), "iterations must be an integer >= 0"),
        (lambda: LowRankSparse(shares=()), "shares must be numbers"),
        (lambda: LowRankSparse(shares=(0.1, 1.0)), "shares must be numbers"),
        (lambda: LowRankSparse(rounds=-1), "rounds must be"),
        (lambda: LowRankMasked(pattern="2:4"), "pattern must be 'unstructured' or"),
        (lambda: LowRankMasked(pattern=(4, 4)), r"got \(4, 4\)"),
        (lambda: LowRankMasked(pattern=(0, 4)), r"got \(0, 4\)"),
        (lambda: LowRankMasked(pattern=(1, 2, 4)), r"got \(1, 2, 4\)"),
        (lambda: LowRankMasked(pattern=(1.5, 4)), r"got \(1.5, 4\)"),
        (lambda: LowRankMasked(ranks=()), "ranks must be shares"),
        (lambda: LowRankMasked(ranks=(0.0,)), "ranks must be shares"),
        (lambda: LowRankMasked(iterations=-1), "iterations must be an integer >= 0"),
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
        (DenseSparse(), (4, 5), "5 coefficients per row need as many atoms"),
        (DenseSparse(), (4,), r"expected a size \(atoms, coefficients per row\) for shape"),
        (DenseSparse(), None, "got None"),
        (LowRankSparse(), (7, 1), "needs a rank up to 6"),
        (LowRankSparse(), (2, 9), "8 inputs or fewer"),
        (LowRankSparse(), (0, 1), "expected a size"),
        (LowRankMasked(), (7, 1), "needs a rank up to 6 and at most 48 entries"),
        (LowRankMasked(), (2, 49), "at most 48 entries"),
        (LowRank24(), (2, 23), "needs a rank up to 6 and 24 entries"),
        (LowRank24(), (2, 25), "24 entries"),
        (Blast(), (7, 1), "7 blocks per side do not fit"),
        (Blast(), (2, 2, 2), "expected a size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(way: Any, size: Any, said: str) -> None:
    option = Option("", size, "", Cost(0, 0, 0), 0.0)
    with pytest.raises(LowrankError, match=said):
        way.factor(linear(6, 8), option, statistics(inputs(8)))
    with pytest.raises(LowrankError, match="expected the gram of an input of width 8, got none"):
        way.curve(site(linear(6, 8)), Statistics())


@pytest.mark.parametrize(("way", "kind"), WAYS, ids=NAMES)
def test_a_refit_serves_the_stream_that_it_reads(way: Any, kind: type) -> None:
    """Of inputs that were turned into others, it comes nearer to what the dense layer says."""
    layer, x = linear(24, 20), inputs(20)
    turn = (
        torch.eye(20).double()
        + 0.5 * torch.randn(20, 20, generator=torch.Generator().manual_seed(7)).double() / 20**0.5
    )
    y = x @ turn
    stats = statistics(x)
    options = [option for option in way.curve(site(layer), stats).options if option.size]
    option = options[len(options) // 2]
    gram, cross = y.T @ y / len(y), x.T @ y / len(y)
    with torch.no_grad():
        want, errors = layer(x), {}
        for name, new in (
            ("old", way.factor(layer, option, stats)),
            ("new", refitted_form(way, layer, option, gram, cross)),
        ):
            assert type(new) is kind
            assert new.spec() == errors.setdefault("spec", new.spec())
            assert torch.equal(new.bias, layer.bias)
            errors[name] = float((new(y) - want).square().sum())
    assert errors["new"] < 0.5 * errors["old"]


def test_auto_is_never_farther_than_any_form_by_its_own_curve() -> None:
    layer, stats = linear(36, 48), statistics(inputs(48))
    forms = ("factors", "pivoted", "lowrank-sparse")
    way = Auto(forms=forms)
    curve, rows = way.curve(site(layer), stats), inputs(48)
    parts = [LowRankSparse().curve(site(layer), stats), Whitened().curve(site(layer), stats)]
    for part in (*parts, pivoted_curve(parts[1], site(layer))):
        for option in part.options:
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
    assert all(own_form(name) for name in NAMES if name != "sparse-dense")
    assert own_form(DenseSparse())
    assert not any(own_form(name) for name in ("svd", "basis-sharing", None, "none such"))
    assert not own_form(Whitened())
