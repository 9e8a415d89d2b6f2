"""Semi-NMF: non-negative, between two tails of the SVD, and never worse by an update."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.linalg import semi_nmf
from lowrank.linalg.snmf import CONDITION

SHAPES = [(12, 20), (20, 12), (16, 16)]


def weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=rng, dtype=torch.float64)


def error(matrix: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    return float(np.square(matrix.numpy() - up.numpy() @ down.numpy()).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 5, 9, 12])
def test_the_error_lies_between_the_tails_of_this_rank_and_of_one_less(
    shape: tuple[int, int], rank: int
) -> None:
    for seed in range(3):
        matrix = weight(*shape, seed)
        energy = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
        up, down = semi_nmf(matrix, rank)
        assert up.shape == (shape[0], rank)
        assert down.shape == (rank, shape[1])
        assert (up >= 0).all()
        slack = 1e-9 * energy.sum()
        low, high = energy[rank:].sum(), energy[rank - 1 :].sum()
        assert low - slack <= error(matrix, up, down) <= high + slack


@pytest.mark.parametrize("iterations", [1, 5, 100])
def test_updates_lower_the_error_and_down_is_the_least_squares_solution(iterations: int) -> None:
    matrix = weight(30, 20, 3)
    start = error(matrix, *semi_nmf(matrix, 4, iterations=0))
    up, down = semi_nmf(matrix, 4, iterations=iterations)
    assert error(matrix, up, down) < start
    solved = np.linalg.lstsq(up.numpy(), matrix.numpy(), rcond=None)[0]
    np.testing.assert_allclose(down.numpy(), solved, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_made_of_parts_is_found_again(shape: tuple[int, int]) -> None:
    for seed in range(3):
        matrix = weight(shape[0], 3, seed).abs() @ weight(3, shape[1], seed + 9)
        up, down = semi_nmf(matrix, 3)
        assert (up >= 0).all()
        assert error(matrix, up, down) <= 1e-20 * float(matrix.square().sum())


def test_components_do_not_cancel() -> None:
    """The columns are far from parallel, so that rounding to 16 bits costs little."""
    for seed in range(10):
        up, _ = semi_nmf(weight(24, 40, seed), 13)
        assert np.linalg.cond(up.numpy() / np.linalg.norm(up.numpy(), axis=0)) <= CONDITION


def test_a_better_start_is_hard_to_find() -> None:
    """Ding's updates from 20 random starts, in NumPy, end no lower than 2 % below ours."""
    matrix = weight(20, 30, 1)
    ours = error(matrix, *semi_nmf(matrix, 4))
    rng, best = np.random.default_rng(0), np.inf
    for _ in range(20):
        w, up = matrix.numpy(), rng.random((20, 4))
        for _ in range(100):
            down = np.linalg.pinv(up) @ w
            a, b = w @ down.T, down @ down.T
            more = np.maximum(a, 0) + up @ np.maximum(-b, 0)
            up *= np.sqrt(more / (np.maximum(-a, 0) + up @ np.maximum(b, 0) + 1e-12))
        best = min(best, np.square(w - up @ np.linalg.pinv(up) @ w).sum())
    assert ours <= best / 0.98


def test_a_zero_weight_and_a_rank_above_that_of_the_weight_are_served() -> None:
    for matrix in (torch.zeros(6, 9), torch.ones(6, 9), -torch.ones(6, 9).double()):
        for rank in (1, 3, 6):
            up, down = semi_nmf(matrix, rank)
            assert (up >= 0).all()
            torch.testing.assert_close(up @ down, matrix.double(), atol=1e-12, rtol=0)
