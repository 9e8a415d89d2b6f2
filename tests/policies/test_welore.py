"""One threshold on min-max-normalised singular values: methods/core.md §1, tests 1f."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lowrank.errors import LowrankError
from lowrank.policies import WeLore
from lowrank.policies.common import only_aligned
from lowrank.policies.welore import kept, normalised
from lowrank.types import Budget, Curve, Option

from .curves import budget, curve, falling, of, some_curves, spent

SPECTRUM = np.array([10, 6, 4, 3, 2, 1.5, 1.2, 1])
# 1f counts what is pruned; above 1 the authors prune all of it, here one is always kept.
PRUNED = {0.05: 2, 0.1: 3, 0.175: 4, 0.3: 5, 0.6: 7, 1.0: 7, 1.01: 7, 0: 0, 1e-9: 1, -1: 0}


def test_the_numbers_of_the_reference() -> None:
    want = [1, 0.5556, 0.3333, 0.2222, 0.1111, 0.0556, 0.0222, 0]
    np.testing.assert_allclose(normalised(SPECTRUM), want, atol=5e-5)


@pytest.mark.parametrize("threshold", PRUNED)
def test_what_is_pruned_at_a_threshold(threshold: float) -> None:
    assert len(SPECTRUM) - kept(normalised(SPECTRUM), threshold) == PRUNED[threshold]


def by_the_formula(one: Curve, threshold: float) -> Option:
    """#{s̃ ≥ t} singular values where that is smaller than the dense weight, else dense."""
    values = one.spectrum.numpy()
    scaled = (values - values.min()) / (values.max() - values.min())
    rank = max(1, int((scaled >= threshold).sum()))
    return next((o for o in one.options if o.size == (rank,)), one.dense)


def test_a_fixed_threshold_is_the_formula() -> None:
    for seed in range(10):
        curves = some_curves(seed, count=5)
        for threshold in (0.0, 0.05, 0.175, 0.5, 1.0, 3.0):
            found = WeLore(threshold=threshold)(curves, Budget(0))
            assert all(found[one.sites] == by_the_formula(one, threshold) for one in curves)


def test_the_threshold_for_a_budget_is_the_best_of_all() -> None:
    for seed in range(20):
        curves = some_curves(seed, count=4, sizes=(8, 24))
        every = np.concatenate([normalised(one.spectrum.numpy()) for one in curves])
        for keep in ("0.35", "0.6", "0.85"):
            limit = budget(curves, keep)
            costs = [sum(by_the_formula(c, t).cost.params for c in curves) for t in every]
            best = max(cost for cost in costs if cost <= limit.limit)
            assert spent(WeLore()(curves, limit)) == best


def test_a_threshold_at_the_quantile_prunes_exactly_that_many() -> None:
    """Of distinct values, the (P+1)-th smallest as threshold prunes P of all, whatever the P."""
    for seed in range(5):
        values = [normalised(falling(12, 10 * seed + i)) for i in range(4)]
        every = np.sort(np.concatenate(values))
        distinct = np.unique(every)
        for threshold in distinct:
            pruned = sum(len(v) - kept(v, threshold) for v in values)
            assert pruned == int((every < threshold).sum())
        # The minima are all 0 and the maxima all 1; in between, one more threshold prunes one more.
        assert len(distinct) == len(every) - 3 - 3


def test_the_gate_is_at_break_even() -> None:
    """A square weight of side 16 breaks even at rank 8, one of (8, 32) at 6.4."""
    for shape, last in (((16, 16), 7), ((8, 32), 6)):
        count = min(shape)
        one = curve("a", shape, np.linspace(2, 1, count))
        for rank in range(1, count + 1):
            threshold = normalised(one.spectrum.numpy())[rank - 1]
            option = WeLore(threshold=float(threshold))([one], Budget(0))[one.sites]
            assert option.size == ((rank,) if rank <= last else None)
            assert option.cost.params <= math.prod(shape)


def test_scale_does_not_matter() -> None:
    for factor in (1e-8, 3.0, 1e8):
        curves = some_curves(2, count=4)
        scaled = [replace(one, spectrum=one.spectrum * factor) for one in curves]
        ranks = [
            {sites: option.size for sites, option in WeLore()(every, limit).items()}
            for every in (curves, scaled)
            for limit in [budget(curves, "0.5")]
        ]
        assert ranks[0] == ranks[1]


def test_orthogonal_weights_give_no_nan_and_can_be_cut_anywhere() -> None:
    """0/0 in the authors' code. A constant spectrum, also one with rounding, falls evenly."""
    rng = np.random.default_rng(0)
    for noise in (0.0, 1e-16):
        values = np.sort(1 + noise * rng.standard_normal(20))[::-1]
        np.testing.assert_allclose(normalised(values), np.linspace(1, 0, 20))
        curves = [curve(name, (20, 20), values) for name in "ab"]
        for rank in range(1, 10):
            found = WeLore()(curves, Budget(2 * rank * 40))
            assert {option.size for option in found.values()} == {(rank,)}


def test_spectra_of_one_value_and_of_zeros() -> None:
    assert normalised(np.array([3.0])).tolist() == [1.0]
    assert normalised(np.array([0.0])).tolist() == [1.0]
    assert np.isfinite(normalised(np.zeros(4))).all()
    assert normalised(np.array([1.0, 0.0])).tolist() == [1.0, 0.0]


def test_where_a_curve_lacks_a_rank_the_one_below_is_taken() -> None:
    one = curve("a", (64, 64), np.linspace(2, 1, 64))  # break-even: 32
    (coarse,) = only_aligned([one], 8)
    for rank, want in {5: 8, 8: 8, 15: 8, 24: 24, 31: 24, 32: None, 60: None}.items():
        threshold = float(normalised(one.spectrum.numpy())[rank - 1])
        option = WeLore(threshold=threshold)([coarse], Budget(0))[one.sites]
        assert option.size == (None if want is None else (want,))


def test_pivoted_curves_have_a_gate_of_their_own() -> None:
    """r(2n − r) reaches n² at full rank alone, also where a coarse curve lacks the rank."""
    one = curve("a", (64, 64), np.linspace(2, 1, 64))
    every = [Option("svd", (r,), "pivoted", of(r * (128 - r)), 64.0 - r) for r in range(1, 64)]
    (coarse,) = only_aligned([replace(one, options=(*every, one.dense))], 8)
    for rank, want in {5: 8, 15: 8, 31: 24, 32: 32, 39: 32, 60: 56, 63: 56, 64: None}.items():
        threshold = float(normalised(one.spectrum.numpy())[rank - 1])
        option = WeLore(threshold=threshold)([coarse], Budget(0))[one.sites]
        assert option.size == (None if want is None else (want,)), rank


def test_a_budget_below_the_least_is_an_error() -> None:
    one = curve("a", (20, 20))
    with pytest.raises(LowrankError, match="welore needs at least 40 params, the budget is 39"):
        WeLore()([one], Budget(39))


def test_curves_without_a_spectrum_are_named() -> None:
    blind = replace(curve("blind", (20, 20)), spectrum=None)
    with pytest.raises(LowrankError, match="no spectrum for blind"):
        WeLore()([curve("a", (8, 8)), blind], Budget(500))
