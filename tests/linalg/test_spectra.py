"""Figures of a spectrum, against numpy on singular values and against known cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowrank import linalg


def energy_of(matrix: torch.Tensor) -> torch.Tensor:
    return linalg.energies(matrix.double())


def oracle(values: np.ndarray) -> dict[str, float]:
    """From singular values by numpy's svd."""
    found = {}
    for name, weights in (("effective", values**2), ("entropy", values)):
        p = weights[weights > 0] / weights.sum()
        found[name] = float(np.exp(-(p * np.log(p)).sum()))
    found["stable"] = float((values**2).sum() / values[0] ** 2)
    found["condition"] = float(values[0] / values[-1])
    return found


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30), (1, 9)])
def test_figures_agree_with_numpy(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = np.linalg.svd(matrix.numpy())[1]
    energy, want = energy_of(matrix), oracle(values)
    assert linalg.effective_rank(energy) == pytest.approx(want["effective"], rel=1e-9)
    assert linalg.entropy_rank(energy) == pytest.approx(want["entropy"], rel=1e-9)
    assert linalg.stable_rank(energy) == pytest.approx(want["stable"], rel=1e-9)
    assert linalg.condition_number(energy) == pytest.approx(want["condition"], rel=1e-6)
    kept = np.cumsum(values**2) / (values**2).sum()
    for share in (0.5, 0.9, 0.99):
        assert linalg.rank_for(share, energy) == int((kept < share).sum()) + 1


def test_equal_singular_values_count_themselves() -> None:
    energy = torch.cat([torch.full((5,), 4.0), torch.zeros(3)]).double()
    for figure in (linalg.effective_rank, linalg.entropy_rank, linalg.stable_rank):
        assert figure(energy) == pytest.approx(5)
    assert linalg.rank_for(0.99, energy) == 5
    assert linalg.condition_number(energy) == math.inf
    assert linalg.condition_number(energy[:5]) == 1


def test_noise_inflates_the_entropy_of_singular_values_only() -> None:
    """The sanity values of a 256 x 256 matrix, within the spread of the draws."""
    generator = torch.Generator().manual_seed(0)

    def figures(matrix: torch.Tensor) -> list[float]:
        e = energy_of(matrix)
        return [linalg.entropy_rank(e), linalg.effective_rank(e), linalg.stable_rank(e),
                linalg.rank_for(0.99, e)]  # fmt: skip

    iid = [figures(torch.randn(256, 256, generator=generator)) for _ in range(3)]
    assert np.mean(iid, 0) == pytest.approx([206.1, 155.3, 64.8, 198], rel=0.03)

    def noisy() -> torch.Tensor:
        signal = torch.randn(256, 8, generator=generator) @ torch.randn(8, 256, generator=generator)
        return signal + 0.3 * torch.randn(256, 256, generator=generator)

    planted = np.mean([figures(noisy()) for _ in range(5)], 0)
    assert planted == pytest.approx([42.8, 8.5, 5.7, 10], rel=0.15)
    assert planted[0] > 4 * planted[1]


def test_nothing_is_divided_by_zero() -> None:
    zero = torch.zeros(6, dtype=torch.float64)
    for figure in (linalg.effective_rank, linalg.entropy_rank, linalg.stable_rank,
                   linalg.condition_number):  # fmt: skip
        assert figure(zero) == 0
        assert figure(zero[:0]) == 0
    assert linalg.rank_for(0.9, zero) == 0
