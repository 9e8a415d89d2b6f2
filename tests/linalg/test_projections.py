"""Projections: columns of norm one and nearly at right angles, one adjoint, one exact product."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lowrank import LowrankError
from lowrank.linalg import projections
from lowrank.linalg.projections import PROJECTIONS, hadamard, projection, starting_point

SIZE, DIMENSION = 3000, 50
BOUNDS = torch.linspace(0.1, 1, SIZE, dtype=torch.float64)
EVERY = pytest.mark.parametrize("kind", PROJECTIONS)


def made(kind: str, seed: int = 0, size: int = SIZE, dimension: int = DIMENSION) -> Any:
    return projection(kind, dimension, seed, BOUNDS[:size])


def matrix(p: Any) -> torch.Tensor:
    """P, column by column, by its transpose."""
    return torch.stack([p.transposed(row) for row in torch.eye(p.size).double()])


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()


@EVERY
def test_both_ways_are_one_matrix(kind: str) -> None:
    p = made(kind, size=301, dimension=20)
    z, whole = draw(20), matrix(p)
    assert torch.allclose(p.times(z), whole @ z, atol=1e-12)
    assert torch.allclose(p.exact(z), whole @ z, atol=1e-12)
    assert p.times(z.float()).dtype == torch.float32
    # <P z, g> = <z, Pᵀ g>, to the rounding that the specification found.
    g = draw(301)
    assert float(p.times(z) @ g) == pytest.approx(float(z @ p.transposed(g)), rel=3e-13)


@pytest.mark.parametrize("kind", ["dense", "sparse", "fastfood"])
def test_columns_have_norm_one_and_differ(kind: str) -> None:
    p = made(kind)
    columns = torch.stack([p.times(row) for row in torch.eye(DIMENSION).double()])
    norms = columns.norm(dim=1)
    assert float(norms.mean()) == pytest.approx(1, abs=0.01)
    assert float(norms.std()) < (0.03 if kind == "fastfood" else 1e-9)
    unit = columns / norms[:, None]
    cosines = (unit @ unit.T - torch.eye(DIMENSION)).abs()
    assert float(cosines.max()) < 0.12  # of as many random directions: about 4.5 / √3000


def test_a_column_of_kaiming_is_an_initialisation() -> None:
    p = made("kaiming")
    column = p.times(torch.eye(DIMENSION).double()[3])
    assert bool((column.abs() < BOUNDS).all())
    assert float((column / BOUNDS).std()) == pytest.approx(3**-0.5, abs=0.02)
    start = starting_point(0, BOUNDS)
    assert bool((start.abs() < BOUNDS).all())
    assert abs(float(torch.corrcoef(torch.stack([start, column]))[0, 1])) < 0.08


def test_sparse_columns_have_as_many_entries_as_they_should() -> None:
    column = made("sparse").times(torch.eye(DIMENSION).double()[0])
    assert int((column != 0).sum()) == math.isqrt(SIZE)


@EVERY
def test_the_exact_product_is_the_same_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two threads, in other chunks, and when only part of the memory is there."""
    z, before = draw(DIMENSION), torch.get_num_threads()
    want = made(kind).exact(z)
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(projections, "CHUNK", 7 * SIZE)
        monkeypatch.setattr(projections, "KEPT", 0)
        p = made(kind)
        assert torch.equal(p.exact(z), want)
        assert torch.allclose(p.times(z), want)
        assert torch.allclose(p.transposed(want), made(kind).transposed(want))
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(made(kind, seed=1).exact(z), want)


def test_hadamard_is_its_own_inverse_but_for_the_length() -> None:
    x = draw(16)
    assert torch.allclose(hadamard(hadamard(x)), 16 * x)
    assert hadamard(torch.eye(2).double()[1]).tolist() == [1, -1]


def test_what_is_no_subspace_is_refused() -> None:
    for wrong in (0, SIZE + 1):
        with pytest.raises(LowrankError, match=r"dimension must be in \[1, 3000\]"):
            made("dense", dimension=wrong)
    with pytest.raises(LowrankError, match="did you mean 'sparse'"):
        made("sparce")
