"""Rows out of those of similar tokens, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.linalg.neighbours import drawn_rows, mixed_rows, nearest_mixture


def table(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_nearest_ten_are_weighted_by_a_softmax() -> None:
    cosines = {row: row / 20 for row in range(15)}
    mixture = nearest_mixture(cosines)
    assert list(mixture) == list(range(14, 4, -1))
    weights = np.exp(np.array([*mixture]) / 20 / 0.1)
    np.testing.assert_allclose([*mixture.values()], weights / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize("shape", [(6, 4), (6,)])
def test_rows_are_mixed_and_a_product_with_them(shape: tuple[int, ...]) -> None:
    rows = table(*shape)
    mixed = mixed_rows(rows, [{0: 0.25, 3: 0.75}, {5: 1.0}])
    np.testing.assert_allclose(mixed[0], 0.25 * rows[0] + 0.75 * rows[3], rtol=1e-6)
    assert torch.equal(mixed[1], rows[5])
    if rows.ndim == 2:
        basis = table(4, 7).double()
        through = mixed_rows(rows.double(), [{0: 0.5, 2: 0.5}]) @ basis
        torch.testing.assert_close(through, mixed_rows(rows.double() @ basis, [{0: 0.5, 2: 0.5}]))


def test_an_empty_mixture_is_zero_and_dtypes_stay() -> None:
    rows = table(6, 4).bfloat16()
    mixed = mixed_rows(rows, [{}, {2: 1.0}])
    assert mixed.dtype == torch.bfloat16
    assert not mixed[0].any()
    assert torch.equal(mixed[1], rows[2])


def test_draws_have_the_mean_and_deviation_of_each_coordinate() -> None:
    rows = table(500, 3) * torch.tensor([1.0, 5.0, 0.0]) + torch.tensor([0.0, 10.0, 2.0])
    drawn = drawn_rows(rows, 20_000, torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn.mean(0), rows.mean(0), rtol=0.02, atol=0.05)
    torch.testing.assert_close(drawn.std(0), rows.std(0), rtol=0.03, atol=1e-3)
    again = drawn_rows(rows, 20_000, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
