"""CUR: the middle matrix is the least-squares one at every rank, and its error is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank import linalg
from lowrank.linalg.cur import BLOCK, cross_of, pivoted_order

from ..draws import falling, normal

EYE = np.eye(24)


def metric(side: int) -> torch.Tensor:
    rows = normal(90, side, seed=5) @ normal(side, side, seed=6)
    return rows.T @ rows / 90


def root(gram: torch.Tensor | None) -> np.ndarray:
    return EYE if gram is None else np.linalg.cholesky(gram.numpy())


@pytest.mark.parametrize("choice", linalg.CHOICES)
@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("rows", [15, 40])
def test_all_ranks_have_the_least_squares_middle(
    rows: int, whitened: bool, choice: linalg.Choice
) -> None:
    weight, gram = normal(rows, 24, seed=3), metric(24) if whitened else None
    cross, half, w = cross_of(weight, 12, gram, choice=choice), root(gram), weight.numpy()
    errors = cross.errors()
    assert float(errors[0]) == pytest.approx(np.square(w @ half).sum())
    for rank in (1, 2, 5, 12):
        left, right = w[:, cross.columns[:rank].numpy()], w[cross.rows[:rank].numpy()]
        best = np.linalg.pinv(left) @ w @ half @ np.linalg.pinv(right @ half)
        np.testing.assert_allclose(cross.middle(rank), best, rtol=1e-7, atol=1e-9)
        error = np.square((w - left @ best @ right) @ half).sum()
        assert float(errors[rank]) == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize("seed", [0, 2])
def test_near_the_optimum_where_the_cross_form_is_not(seed: int) -> None:
    """σ_k = 1/k: 1.54 times the error of the best rank 20; W[I, J]⁻¹ in the middle is far off."""
    weight, best = falling(400, 300, 20, seed)
    cross = cross_of(weight, 20)
    error = float(cross.errors()[20]) ** 0.5 / best
    assert error == pytest.approx(1.54, rel=0.03)
    left, right = weight[:, cross.columns], weight[cross.rows]
    inverse = torch.linalg.solve(left[cross.rows], right)
    assert float((weight - left @ inverse).norm()) / best > 1.5 * error
    by_leverage = float(cross_of(weight, 20, choice="leverage").errors()[20]) ** 0.5 / best
    assert error < by_leverage < 3


def test_pivots_are_the_columns_farthest_from_those_before() -> None:
    count = BLOCK + 6
    matrix, chosen = normal(80, 90, seed=2).numpy(), list[int]()
    for _ in range(count):
        basis = np.linalg.qr(matrix[:, chosen])[0]
        chosen.append(int(np.square(matrix - basis @ (basis.T @ matrix)).sum(0).argmax()))
    gram = torch.from_numpy(matrix.T @ matrix)
    assert pivoted_order(gram, count).tolist() == chosen


@pytest.mark.parametrize("choice", linalg.CHOICES)
@pytest.mark.parametrize("whitened", [False, True])
def test_what_depends_on_others_has_no_part(whitened: bool, choice: linalg.Choice) -> None:
    """A weight of rank three, each row twice: three rows and columns give it whole."""
    weight = (normal(9, 3, seed=1) @ normal(3, 24, seed=2)).repeat(2, 1)
    cross = cross_of(weight, 10, metric(24) if whitened else None, choice=choice)
    assert len(set(cross.rows.tolist())) == len(set(cross.columns.tolist())) == 10
    assert float(cross.errors()[2]) > 0
    assert float(cross.errors()[3]) <= 1e-8 * cross.total
    middle = cross.middle(10)
    assert float(middle[3:].abs().sum() + middle[:, 3:].abs().sum()) == 0
    whole = weight[:, cross.columns] @ middle @ weight[cross.rows]
    torch.testing.assert_close(whole, weight, atol=1e-9, rtol=0)


def test_a_zero_weight_has_a_zero_middle() -> None:
    cross = cross_of(torch.zeros(5, 8), 4)
    assert cross.errors().tolist() == [0] * 5
    assert cross.middle(4).abs().sum() == 0


def test_rounded_to_16_bits_the_product_stays_near() -> None:
    """Columns that differ by less than their own rounding are not told apart."""
    weight = (normal(20, 1, seed=1) @ normal(1, 30, seed=2)).to(torch.bfloat16)
    cross = cross_of(weight, 6)
    exact = weight.double()
    middle = cross.middle(6).to(torch.bfloat16).double()
    made = exact[:, cross.columns] @ middle @ exact[cross.rows]
    assert float((exact - made).norm()) < 0.02 * float(exact.norm())
