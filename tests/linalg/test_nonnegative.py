"""NMF: exact where an exact one exists, never rising, never negative, the same on each run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank import LowrankError, linalg


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_planted_parts_are_found() -> None:
    """Each position shows one of three parts: then the factorisation is unique."""
    parts = torch.eye(3, dtype=torch.float64).repeat_interleave(4, 1)
    place = torch.arange(60) % 3
    a = draw(60)[:, None] * parts[place]
    maps, found = linalg.nmf(a, 3, iterations=500, tolerance=0.0)
    assert linalg.relative_error(a, maps, found) < 1e-6
    similar = found @ parts.T / 2  # both of norm 1
    assert similar.amax(0).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    energy = maps.square().sum(0)
    assert (energy[:-1] >= energy[1:]).all()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_error_falls_and_stays_above_the_svd(rank: int) -> None:
    a = draw(40, 12, seed=1)
    errors = [
        linalg.relative_error(a, *linalg.nmf(a, rank, iterations=n, tolerance=0.0))
        for n in (1, 5, 25, 200)
    ]
    assert errors == sorted(errors, reverse=True)
    values = np.linalg.svd(a.numpy())[1]
    best = float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))
    assert errors[-1] >= best - 1e-12
    if rank == 1:  # the leading singular pair of a matrix ≥ 0 is ≥ 0
        assert errors[-1] == pytest.approx(best, abs=1e-9)
    maps, parts = linalg.nmf(a, rank)
    assert (maps >= 0).all()
    assert (parts >= 0).all()
    assert all(map(torch.equal, (maps, parts), linalg.nmf(a, rank)))
    assert not torch.equal(maps, linalg.nmf(a, rank, seed=1)[0])


def test_zero_rows_and_a_zero_matrix_do_no_harm() -> None:
    a = draw(9, 5)
    a[3] = 0
    maps, _ = linalg.nmf(a, 2)
    assert maps[3].tolist() == [0, 0]
    zero = torch.zeros(6, 4)
    maps, parts = linalg.nmf(zero, 2)
    assert torch.equal(maps @ parts, zero.double())
    assert linalg.relative_error(zero, maps, parts) == 0


def test_what_is_negative_is_refused() -> None:
    with pytest.raises(LowrankError, match="use semi_nmf"):
        linalg.nmf(-draw(3, 3), 1)
    with pytest.raises(LowrankError, match="use semi_nmf"):
        linalg.nmf(draw(3, 3) / 0, 1)
    with pytest.raises(LowrankError, match="rank must be at least 1, got 0"):
        linalg.nmf(draw(3, 3), 0)
