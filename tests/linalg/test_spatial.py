"""Rows and columns of a kernel apart: a matrix's SVD, with NumPy beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank import LowrankError, linalg


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (3, 6, 2, 5), (4, 4, 1, 3)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_it_is_the_best_of_its_rank(shape: tuple[int, ...], rank: int) -> None:
    weight = normal(*shape)
    up, down = linalg.spatial_factors(weight, rank)
    assert up.shape == (shape[0], rank, shape[3])
    assert down.shape == (rank, shape[1], shape[2])
    near = sum(np.einsum("ob,ia->oiab", up[:, r].numpy(), down[r].numpy()) for r in range(rank))
    error = ((weight.numpy() - near) ** 2).sum()
    matrix = np.stack(
        [weight.numpy()[o, :, :, b].ravel() for o in range(shape[0]) for b in range(shape[3])]
    )
    values = np.linalg.svd(matrix, compute_uv=False)
    assert error == pytest.approx((values[rank:] ** 2).sum(), abs=1e-10)
    energies = linalg.spatial_energies(weight)
    np.testing.assert_allclose(energies, values**2, atol=1e-10)
    assert float(linalg.tails(energies)[rank]) == pytest.approx(error, abs=1e-10)


def test_separable_kernels_need_one_channel() -> None:
    weight = torch.einsum("oa,ib->oiba", normal(5, 3), normal(4, 3, seed=1))
    up, down = linalg.spatial_factors(weight, 1)
    torch.testing.assert_close(torch.einsum("orb,ria->oiab", up, down), weight)
    swapped = torch.einsum("ora,rib->oiab", up, down)  # rows for columns
    assert float((swapped - weight).norm()) > 0.1


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(LowrankError, match=r"expected a weight \(O, I, kh, kw\)"):
        linalg.spatial_energies(normal(3, 3, 3))
    with pytest.raises(LowrankError, match=r"expected a weight \(O, I, kh, kw\)"):
        linalg.spatial_factors(normal(3, 3, 3, 3, 3), 1)
