"""The number of components above the noise: planted ranks, either way round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank import LowrankError, linalg


def noisy(shape: tuple[int, int], rank: int, ratio: float, seed: int = 0) -> torch.Tensor:
    """A planted rank whose singular values are `ratio` times the largest of the noise."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((shape[0], max(rank, 1))))[0][:, :rank]
    right = np.linalg.qr(rng.standard_normal((shape[1], max(rank, 1))))[0][:, :rank]
    edge = shape[0] ** 0.5 + shape[1] ** 0.5  # of unit noise
    signal = ratio * edge * left @ right.T
    return torch.from_numpy(signal + rng.standard_normal(shape))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (20, 300), (300, 20)])
@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_planted_rank_is_found_either_way_round(
    shape: tuple[int, int], rank: int, scale: float
) -> None:
    """T13."""
    for seed in range(3):
        weight = scale * noisy(shape, rank, 5.0, seed)
        assert linalg.evbmf_rank(weight) == rank
        assert linalg.evbmf_rank(weight.T) == rank


def test_noise_alone_has_none_and_the_floor_holds() -> None:
    for seed in range(5):
        weight = noisy((40, 70), 0, 1.0, seed)
        assert linalg.evbmf_rank(weight, least=0) == 0
        assert linalg.evbmf_rank(weight) == 1
        assert linalg.evbmf_rank(weight, least=8) == 8
        assert linalg.evbmf_rank(weight[:5], least=8) == 5


def test_without_noise_it_is_the_rank() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((30, 4)))
    assert linalg.evbmf_rank(weight @ weight[:20].T) == 4
    assert linalg.evbmf_rank(torch.zeros(4, 6)) == 1
    assert linalg.evbmf_rank(torch.zeros(4, 6), least=0) == 0


def test_both_unfoldings_of_a_kernel() -> None:
    rng = np.random.default_rng(2)
    core = 40 * rng.standard_normal((3, 5, 9))
    out = np.linalg.qr(rng.standard_normal((32, 3)))[0]
    into = np.linalg.qr(rng.standard_normal((24, 5)))[0]
    weight = np.einsum("op,pjk,ij->oik", out, core, into) + rng.standard_normal((32, 24, 9))
    assert linalg.evbmf_ranks(torch.from_numpy(weight)) == (3, 5)
    assert linalg.evbmf_ranks(torch.from_numpy(weight), least=4) == (4, 5)


def test_what_has_no_rank_is_refused() -> None:
    with pytest.raises(LowrankError, match="expected a matrix"):
        linalg.evbmf_rank(torch.ones(2, 2, 2))
    with pytest.raises(LowrankError, match="NaN or Inf"):
        linalg.evbmf_rank(torch.tensor([[1.0, float("nan")]]))
