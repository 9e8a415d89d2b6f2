"""Sums of x xᵀ and the errors measured with them, against float64 done at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank import linalg

from .oracle import grams, root


def rows(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + 0.3


@pytest.mark.parametrize("count", [1, 8191, 8192, 8193, 20_000])
def test_chunks_add_up(count: int) -> None:
    x = rows(count)
    got = linalg.gram_sum(x)
    want = x.double().T @ x.double()
    assert got.dtype == torch.float64
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bit_rows_are_formed_in_float32(dtype: torch.dtype) -> None:
    x = rows(9000).to(dtype)
    want = x.double().T @ x.double()
    assert (linalg.gram_sum(x) - want).norm() <= 1e-5 * want.norm()


def test_float64_rows_stay_exact() -> None:
    x = rows(9000).double() * (1 + 1e-12)
    want = x.T @ x
    assert (linalg.gram_sum(x) - want).norm() <= 1e-14 * want.norm()


def test_the_sum_is_added_in_float64() -> None:
    """What later chunks bring would be lost beside a large first one in float32."""
    x = torch.zeros(3 * 8192, 1)
    x[0], x[8192], x[16384] = 2**15, 1, 1
    assert linalg.gram_sum(x).item() == 2**30 + 2


def test_no_rows_sum_to_zero() -> None:
    assert torch.equal(linalg.gram_sum(rows(0)), torch.zeros(6, 6, dtype=torch.float64))


@pytest.mark.parametrize("side", [1, 1023, 1024, 1601])
def test_wide_rows_are_multiplied_in_parts(side: int) -> None:
    """One side of the diagonal alone; added to what is given, in place."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, side, generator=draw, dtype=torch.float64)
    gram, cross = torch.ones(2, side, side, dtype=torch.float64)
    assert linalg.gram_sum(x, gram) is gram
    assert linalg.cross_sum(x, y, cross) is cross
    torch.testing.assert_close(gram, gram.T)
    torch.testing.assert_close(gram, linalg.gram_sum(x[:25]) + linalg.gram_sum(x[25:]) + 1)
    torch.testing.assert_close(gram, x.T @ x + 1)
    torch.testing.assert_close(cross, x.T @ y + 1)


def test_autocast_of_the_caller_costs_no_digits() -> None:
    x = rows(500)
    plain = linalg.gram_sum(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linalg.gram_sum(x), plain)


def test_large_float16_rows_do_not_overflow() -> None:
    x = torch.full((100, 2), 6e4, dtype=torch.float16)
    assert torch.isfinite(linalg.gram_sum(x)).all()


@pytest.mark.parametrize("gram", [None, *grams(4)])
def test_squared_error(gram: str | None) -> None:
    metric = None if gram is None else grams(9)[gram]
    for seed in range(3):
        one, other = rows(5, 9, seed), rows(5, 9, seed + 10).bfloat16()
        difference = one.double().numpy() - other.double().numpy()
        want = ((difference @ root(metric, 9)) ** 2).sum()
        got = linalg.squared_error(one, other, metric)
        assert isinstance(got, float)
        assert got == pytest.approx(want, rel=1e-9, abs=1e-12)
        assert linalg.squared_error(one, one, metric) == 0


def test_an_indefinite_gram_gives_no_negative_error() -> None:
    """A Gram matrix with rounding in it may have eigenvalues just below zero."""
    metric = torch.diag(torch.tensor([1.0, -1e-9], dtype=torch.float64))
    error = linalg.squared_error(torch.tensor([[0.0, 5.0]]), torch.zeros(1, 2), metric)
    assert 0 < error <= 1e-14, "what is lost there is below the rounding, not known to be nothing"
    energy = linalg.energies(torch.eye(2), metric)
    np.testing.assert_allclose(energy.numpy(), [1.0, 0.0], atol=1e-15)
    assert (energy >= 0).all()


def test_only_a_singular_metric_gets_a_ridge() -> None:
    x = rows(40, 12).double()
    full, few = x.T @ x / 40, linalg.gram_sum(rows(3, 12)) / 3
    assert torch.equal(linalg.steady(full), full)
    ridge = linalg.steady(few) - few
    assert 0 < float(ridge.diagonal().min()) <= 1e-5 * float(few.diagonal().mean())
    assert float(torch.linalg.eigvalsh(linalg.steady(few)).min()) > 0
    assert torch.equal(linalg.steady(0 * full), torch.eye(12, dtype=torch.float64))


def test_the_ridge_grows_until_a_fit_is_of_the_size_of_the_weight() -> None:
    x = rows(40, 12).double()
    tried: list[float] = []

    def fit(metric: torch.Tensor | None) -> torch.Tensor:
        assert metric is not None
        tried.append(float(torch.linalg.eigvalsh(metric).min()))
        return torch.full((2, 12), 100.0 if len(tried) < 3 else 1.0)

    found = linalg.bounded_fit(torch.ones(2, 12), x.T @ x / 40, fit, lambda found: [found])
    assert float(found.max()) == 1
    assert len(tried) == 3
    assert tried == sorted(tried)
    assert tried[2] > tried[0]


def test_units_are_powers_of_two_and_hold_for_denormal_numbers() -> None:
    assert linalg.unit_of(torch.tensor([-5.0, 1.0])) == 4
    assert linalg.unit_of(torch.zeros(3)) == 1
    tiny = torch.tensor([3e-45, 1e-44])
    assert 1 <= float(tiny.double().max()) / linalg.unit_of(tiny) < 2


def test_faint_rows_have_squares() -> None:
    """Those of float32 would be zero."""
    x = rows(50) * 1e-25
    want = x.double().T @ x.double()
    torch.testing.assert_close(linalg.gram_sum(x), want, rtol=1e-12, atol=0)
    cross = linalg.cross_sum(x, x * 1e20)
    torch.testing.assert_close(cross, want * 1e20, rtol=1e-5, atol=0)
