"""Shared-basis blocks: the product by hand, special cases, four matrices of the specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank import linalg
from lowrank.linalg.blast import padded

from .oracle import grams


def draws(seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)


def matrices() -> dict[str, Tensor]:
    """128 × 128 each."""
    normal = draws()
    gaussian = normal(128, 128)
    diagonal = torch.block_diag(*(normal(16, 16) for _ in range(8)))
    rows = [[normal(16, 1) @ normal(1, 16) for _ in range(8)] for _ in range(8)]
    lines = torch.cat([torch.cat(row, 1) for row in rows])
    noisy = normal(128, 16) @ normal(16, 128) + 0.4 * normal(128, 128)
    return {"gaussian": gaussian, "diagonal": diagonal, "rank one": lines, "rank 16": noisy}


def relative(weight: Tensor, near: Tensor, gram: Tensor | None = None) -> float:
    near = near[: weight.shape[0], : weight.shape[1]]
    zero = linalg.squared_error(weight, torch.zeros_like(weight), gram)
    return (linalg.squared_error(weight, near, gram) / zero) ** 0.5


def test_the_product_is_that_of_the_blocks() -> None:
    normal = draws()
    left, mix, right = normal(3, 4, 2), normal(3, 3, 2), normal(3, 2, 5)
    found = linalg.blast_product(left, mix, right)
    for i in range(3):
        for j in range(3):
            block = found[4 * i : 4 * i + 4, 5 * j : 5 * j + 5]
            want = left[i].numpy() @ np.diag(mix[i, j].numpy()) @ right[j].numpy()
            np.testing.assert_allclose(block, want, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "noted"),
    [("gaussian", 0.207), ("diagonal", 0.030), ("rank one", 0.0), ("rank 16", 0.0487)],
)
def test_the_figures_of_the_specification(name: str, noted: float) -> None:
    """b = 8, r = 40; low rank of equal size has rank 50."""
    weight = matrices()[name]
    found = relative(weight, linalg.blast_factors(weight, 8, 40).product())
    assert found <= 1.2 * noted + 1e-3
    tails = linalg.tails(linalg.energies(weight))
    low_rank = float(tails[50] / tails[0]) ** 0.5
    assert found < (1.2 if name == "rank 16" else 0.6) * low_rank


@pytest.mark.parametrize("aware", [True, False])
def test_one_block_is_low_rank(aware: bool) -> None:
    weight = draws()(24, 20)
    gram = grams(20)["good"] if aware else None
    tails = linalg.tails(linalg.energies(weight, gram))
    best = float(tails[6] / tails[0]) ** 0.5
    for sweeps in (1, 300):
        factors = linalg.blast_factors(weight, 1, 6, gram, sweeps=sweeps)
        assert relative(weight, factors.product(), gram) == pytest.approx(best, rel=1e-9)
    more = linalg.blast_factors(weight, 4, 6, gram)
    assert relative(weight, more.product(), gram) < 0.9 * best


def test_the_closing_step_is_optimal_in_the_norm_of_the_outputs() -> None:
    """No other B is better: the error is orthogonal to what B multiplies, in that norm."""
    weight, gram = draws()(20, 24), grams(24)["good"]
    left, mix, right = linalg.blast_factors(weight, 4, 3, gram, sweeps=30)
    rest = weight - linalg.blast_product(left, mix, right)
    for i in range(4):
        rows = torch.cat([mix[i, j][:, None] * right[j] for j in range(4)], 1)
        inner = rest[5 * i : 5 * i + 5] @ gram @ rows.T
        np.testing.assert_allclose(inner, 0, atol=1e-6)


def test_it_serves_the_outputs() -> None:
    normal = draws(1)
    rows = normal(400, 24) * torch.logspace(0, -2, 24).double()
    weight, gram = normal(32, 24), rows.T @ rows / 400
    aware, blind = (linalg.blast_factors(weight, 4, 4, metric).product() for metric in (gram, None))
    assert relative(weight, aware, gram) < 0.8 * relative(weight, blind, gram)


@pytest.mark.parametrize("shape", [(13, 10), (8, 11), (9, 9)])
@pytest.mark.parametrize("name", ["good", "dead inputs", "zero", None])
def test_sides_that_no_block_divides_are_padded(shape: tuple[int, int], name: str | None) -> None:
    weight = draws()(*shape)
    gram = None if name is None else grams(shape[1])[name]
    factors = linalg.blast_factors(weight, 4, 8, gram, sweeps=60)
    whole = factors.product()
    assert whole.shape == padded(weight, 4).shape
    assert all(0 <= side - was < 4 for side, was in zip(whole.shape, shape, strict=True))
    assert all(factor.isfinite().all() for factor in factors)
    if name != "zero":
        assert relative(weight, whole, gram) < 0.35


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_and_zeros(dtype: torch.dtype) -> None:
    for weight in (draws()(12, 8).to(dtype), torch.zeros(12, 8, dtype=dtype)):
        factors = linalg.blast_factors(weight, 2, 4, sweeps=60)
        assert factors.left.dtype == torch.float64
        assert factors.right.any(), "a factor stays alive"
        assert relative(weight, factors.product()) < 0.5 if weight.any() else not factors.left.any()


def test_more_sweeps_and_seeds_change_the_result() -> None:
    weight = matrices()["gaussian"][:32, :32]
    few, many, other = (
        linalg.blast_factors(weight, 4, 8, sweeps=sweeps, seed=seed).product()
        for sweeps, seed in ((5, 0), (100, 0), (100, 1))
    )
    assert relative(weight, many) < 0.9 * relative(weight, few)
    assert not torch.equal(many, other)
