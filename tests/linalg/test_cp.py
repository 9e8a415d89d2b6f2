"""CP of weights: planted components, a best rank one, and sums that have no best."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank import LowrankError, linalg


def planted(shape: tuple[int, ...], rank: int, seed: int = 0) -> torch.Tensor:
    rng, weight = np.random.default_rng(seed), np.zeros(shape)
    for _ in range(rank):
        part = np.ones(())
        for size in shape:
            part = np.multiply.outer(part, rng.standard_normal(size))
        weight += part
    return torch.from_numpy(weight)


def border() -> torch.Tensor:
    """a∘a∘b + a∘b∘a + b∘a∘a: rank 3, yet sums of two come as near as one likes, and diverge."""
    weight = torch.zeros(2, 2, 2, dtype=torch.float64)
    weight[0, 0, 1] = weight[0, 1, 0] = weight[1, 0, 0] = 1
    return weight


def relative(weight: torch.Tensor, parts: tuple) -> float:
    return float((linalg.rebuilt_cp(parts) - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize("shape", [(7, 6, 3), (7, 6, 3, 2), (5, 4, 3, 2, 3)])
def test_planted_components_are_recovered(shape: tuple[int, ...]) -> None:
    weight = planted(shape, 3)
    parts = linalg.cp_factors(weight, 3, tolerance=1e-12, sweeps=600)
    assert relative(weight, parts) < 1e-6
    last, taps, first = parts
    assert last.shape == (shape[0], 3)
    assert first.shape == (3, shape[1])
    assert [t.shape for t in taps] == [(3, size) for size in shape[2:]]
    near = np.zeros(())
    for r in range(3):
        part = np.multiply.outer(last[:, r].numpy(), first[r].numpy())
        for tap in taps:
            part = np.multiply.outer(part, tap[r].numpy())
        near = near + part
    np.testing.assert_allclose(linalg.rebuilt_cp(parts), near, atol=1e-12)


def test_rank_one_is_the_best_one() -> None:
    """By NumPy's power iteration from many starts."""
    weight, rng, best = planted((4, 5, 3), 6), np.random.default_rng(1), 0.0
    for _ in range(30):
        vectors = [rng.standard_normal(n) for n in weight.shape]
        for _ in range(100):
            for mode in range(3):
                found = weight.numpy()
                for other in (2, 1, 0):
                    if other != mode:
                        found = np.tensordot(found, vectors[other], (other, 0))
                vectors[mode] = found / np.linalg.norm(found)
        best = max(best, np.linalg.norm(found))
    parts = linalg.cp_factors(weight, 1, starts=10, tolerance=1e-12)
    want = float(weight.square().sum()) - best**2
    assert relative(weight, parts) * float(weight.square().sum()) == pytest.approx(want, rel=1e-5)


def test_more_components_are_nearer_and_sides_equally_long() -> None:
    weight = planted((6, 6, 3, 3), 12)
    errors = []
    for rank in (2, 5, 9):
        last, taps, first = parts = linalg.cp_factors(weight, rank)
        errors.append(relative(weight, parts))
        lengths = torch.stack([last.norm(dim=0), first.norm(dim=1), *(t.norm(dim=1) for t in taps)])
        torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))
        for side in (first, *taps):
            assert bool((side.gather(1, side.abs().argmax(1, keepdim=True)) > 0).all())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_two_runs_agree_and_the_seed_matters() -> None:
    weight = planted((5, 5, 3), 6)
    one, two, other = (linalg.cp_factors(weight, 3, seed=s, sweeps=5) for s in (0, 0, 1))
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[0], other[0])


def test_components_that_diverge_are_an_error() -> None:
    options = {"sweeps": 400, "tolerance": 0.0, "limit": 3.0}
    with pytest.raises(LowrankError, match=r"the 2 components .* diverge from all 3 starts"):
        linalg.cp_factors(border(), 2, **options)
    parts = linalg.cp_factors(border(), 3, **options)
    assert relative(border(), parts) < 1e-9


def test_a_large_ridge_bounds_them() -> None:
    options = {"sweeps": 400, "tolerance": 0.0, "limit": 3.0}
    parts = linalg.cp_factors(border(), 2, ridge=3.0, **options)
    assert relative(border(), parts) < 0.1


def test_nothing_stays_nothing() -> None:
    parts = linalg.cp_factors(torch.zeros(3, 4, 2), 2)
    assert not linalg.rebuilt_cp(parts).any()
    assert bool((parts[2] != 0).all())  # gradients reach `last`


def test_what_is_no_weight_or_rank_is_refused() -> None:
    with pytest.raises(LowrankError, match=r"got shape \(3, 4\) and rank 2"):
        linalg.cp_factors(torch.ones(3, 4), 2)
    with pytest.raises(LowrankError, match="rank 0"):
        linalg.cp_factors(torch.ones(3, 4, 2), 0)
