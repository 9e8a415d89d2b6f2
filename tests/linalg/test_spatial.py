"""Rows and columns of a kernel apart: a matrix's SVD, with NumPy beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank import LowrankError, linalg

from .oracle import grams, root


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


SHAPE = (5, 3, 2, 4)  # patches of 24 numbers


def product(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """(O, I · kh · kw)."""
    return np.einsum("orb,ria->oiab", up, down).reshape(len(up), -1)


def lost(weight: torch.Tensor, factors: tuple[torch.Tensor, ...], gram: torch.Tensor) -> float:
    rest = weight.flatten(1).numpy() - product(*(f.numpy() for f in factors))
    return float(((rest @ root(gram, rest.shape[1])) ** 2).sum())


@pytest.mark.parametrize("name", grams(24))
def test_outputs_are_nearer_than_by_the_weight(name: str) -> None:
    weight, gram = normal(*SHAPE, seed=2), grams(24)[name]
    total = lost(weight, (torch.zeros(5, 1, 4), torch.zeros(1, 3, 2)), gram)
    for rank in (1, 3, 6):
        plain = lost(weight, linalg.spatial_factors(weight, rank), gram)
        start = lost(weight, linalg.spatial_factors(weight, rank, gram, sweeps=0), gram)
        up, down = linalg.spatial_factors(weight, rank, gram)
        found = lost(weight, (up, down), gram)
        assert up.shape == (5, rank, 4)
        assert down.shape == (rank, 3, 2)
        assert found <= start + 1e-7 * total
        assert start <= plain + 1e-7 * total
        assert bool(torch.isfinite(up).all() and torch.isfinite(down).all())
        if name == "identity":  # there the SVD is the optimum
            assert found == pytest.approx(plain, abs=1e-8 * total)
        if name in ("good", "dead inputs") and rank == 3:
            assert found < 0.999 * plain


def test_neither_side_can_be_improved_alone() -> None:
    """Each against NumPy's least squares for the other one."""
    weight, gram = normal(*SHAPE, seed=3), grams(24)["dead inputs"]
    scale, rank = root(gram, 24), 3
    up, down = (f.numpy() for f in linalg.spatial_factors(weight, rank, gram, sweeps=200))
    found = ((weight.flatten(1).numpy() - product(up, down)) @ scale).ravel()
    for side in (up, down):
        columns = []
        for place in np.ndindex(*side.shape):
            unit = np.zeros_like(side)
            unit[place] = 1
            pair = (unit, down) if side is up else (up, unit)
            columns.append((product(*pair) @ scale).ravel())
        more = np.linalg.lstsq(np.stack(columns, 1), found, rcond=1e-10)[0]
        left = found - np.stack(columns, 1) @ more
        assert (left**2).sum() > 0.98 * (found**2).sum()


def test_kernels_that_separate_where_patches_lie() -> None:
    """Elsewhere they may be anything."""
    few = normal(10, 24, seed=4)
    null = torch.from_numpy(np.linalg.svd(few.numpy())[2][10:])
    planted = torch.einsum("orb,ria->oiab", normal(5, 2, 4), normal(2, 3, 2, seed=1))
    weight = planted + (normal(5, 14, seed=5) @ null).view(SHAPE)
    gram = few.T @ few
    total = lost(weight, (torch.zeros(5, 1, 4), torch.zeros(1, 3, 2)), gram)
    assert lost(weight, linalg.spatial_factors(weight, 2), gram) > 0.05 * total
    found = linalg.spatial_factors(weight, 2, gram, sweeps=100)
    assert lost(weight, found, gram) < 0.01 * total
    swapped = (found[0].flip(1), found[1])
    assert lost(weight, swapped, gram) > 0.05 * total


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(LowrankError, match=r"expected a weight \(O, I, kh, kw\)"):
        linalg.spatial_energies(normal(3, 3, 3))
    with pytest.raises(LowrankError, match=r"expected a weight \(O, I, kh, kw\)"):
        linalg.spatial_factors(normal(3, 3, 3, 3, 3), 1)
