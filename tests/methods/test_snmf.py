"""Semi-NMF as a method: the side that is non-negative, the bound that its curve is, its option."""

from __future__ import annotations

import pytest

from lowrank.errors import LowrankError
from lowrank.methods import SVD, SemiNMF
from lowrank.types import Statistics

from .layers import at_rank, linear, site, weight_error


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_outputs_are_sums_of_parts_within_one_rank_of_the_curve(shape: tuple[int, int]) -> None:
    layer = linear(*shape)
    curve, plain = (m.curve(site(layer), Statistics()) for m in (SemiNMF(), SVD()))
    assert not curve.exact
    assert [o.error for o in curve.options] == [o.error for o in plain.options]
    before = curve.total
    for option in curve.options[:-1]:
        new = SemiNMF().factor(layer, option, Statistics())
        assert (new.up.weight >= 0).all()
        assert (new.down.weight < 0).any()
        error = weight_error(layer, new)
        assert option.error - 1e-9 * curve.total <= error <= before + 1e-9 * curve.total
        before = option.error


def test_the_number_of_updates_is_used() -> None:
    layer = linear(30, 20)
    option = at_rank(SemiNMF().curve(site(layer), Statistics()), 4)
    errors = [
        weight_error(layer, SemiNMF(iterations=n).factor(layer, option, Statistics()))
        for n in (0, 9)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("odd", [-1, 2.5, "many"])
def test_a_number_of_updates_that_is_none_is_refused(odd: object) -> None:
    with pytest.raises(LowrankError, match="iterations must be an integer >= 0, got"):
        SemiNMF(iterations=odd)  # type: ignore[arg-type]
