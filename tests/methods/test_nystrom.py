"""Generalized Nyström as a method: its curve beside the SVD's, its options."""

from __future__ import annotations

import pytest
import torch

from lowrank.errors import LowrankError
from lowrank.methods import SVD, Nystrom, Whitened, WhitenedNystrom
from lowrank.types import Method, Statistics

from .layers import at_rank, inputs, linear, output_error, ranks, site, statistics, weight_error


@pytest.mark.parametrize(("method", "best"), [(Nystrom(), SVD()), (WhitenedNystrom(), Whitened())])
def test_never_nearer_than_the_optimum_and_not_far(method: Nystrom, best: Method) -> None:
    """Every rank is offered, with the error that its layer shows."""
    layer, rows = linear(40, 30), inputs(30)
    stats = statistics(rows)
    curve, optimum = (m.curve(site(layer), stats) for m in (method, best))
    assert ranks(curve.options) == ranks(optimum.options) == [*range(1, 18)]
    for option, least in zip(curve.options[:-1], optimum.options, strict=False):
        assert least.error < option.error < least.error + 0.25 * curve.total
    option = at_rank(curve, 9)
    new = method.factor(layer, option, stats)
    measured = output_error(layer, new, rows) if method.needs else weight_error(layer, new)
    assert measured == pytest.approx(option.error, rel=1e-9)


def test_a_rank_is_cut_from_a_larger_one() -> None:
    layer, stats = linear(40, 30), Statistics()
    curve = Nystrom().curve(site(layer), stats)
    few, many = (Nystrom().factor(layer, at_rank(curve, rank), stats) for rank in (3, 9))
    assert torch.equal(few.up.weight, many.up.weight[:, :3])
    assert torch.equal(few.down.weight, many.down.weight[:3])


def test_the_options_are_used() -> None:
    layer, stats = linear(40, 30), Statistics()

    def error(**options: float) -> float:
        return at_rank(Nystrom(**options).curve(site(layer), stats), 15).error  # type: ignore[arg-type]

    assert error(seed=0) != error(seed=1)
    wide, narrow = (sum(error(seed=s, oversample=o) for s in range(4)) for o in (2.0, 0.0))
    assert wide < narrow
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(LowrankError, match="oversample must be a number >= 0, got"):
            Nystrom(oversample=wrong)
