"""TT-SVD against NumPy: cores rebuild the table, errors are those of its two cuts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowrank import linalg
from lowrank.linalg.tensor_train import column_sides, most_ranks, row_sides


def table(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


def by_loops(cores: tuple[torch.Tensor, ...], rows: int) -> np.ndarray:
    """Every number by the formula."""
    first, middle, last = (core.numpy() for core in cores)
    n2, n3 = len(middle), len(last)
    found = [
        np.einsum(
            "jr,rks,sl->jkl", first[i // (n2 * n3)], middle[i // n3 % n2], last[i % n3]
        ).ravel()
        for i in range(rows)
    ]
    return np.stack(found)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 27, 28, 1000, 1001, 10**6, 10**6 + 1])
def test_three_sides_hold_the_rows_and_few_more(rows: int) -> None:
    sides = row_sides(rows)
    assert math.prod(sides) >= rows
    assert math.prod(sides[:2]) * (sides[2] - 1) < rows
    assert list(sides) == sorted(sides, reverse=True)
    assert sides[0] - sides[2] <= 2 + rows ** (1 / 3) / 50


@pytest.mark.parametrize(
    ("columns", "sides"),
    [(16, (2, 2, 4)), (64, (4, 4, 4)), (12, (2, 2, 3)), (10, (2, 1, 5)), (7, (1, 1, 7))],
)  # fmt: skip
def test_columns_are_split_evenly_the_least_in_the_middle(
    columns: int, sides: tuple[int, int, int]
) -> None:
    assert column_sides(columns) == sides


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (5, 2), (6, 7)])
def test_cores_are_near_by_as_much_as_is_said(ranks: tuple[int, int]) -> None:
    """Against SVDs of the two unfoldings; the second of what the first leaves."""
    whole, rows, columns = table(23, 12), (3, 3, 3), (2, 2, 3)
    cores = linalg.tt_cores(whole, rows, columns, ranks)
    lost = np.square(whole.numpy() - by_loops(cores, 23)).sum()
    padded = np.zeros((27, 12))
    padded[:23] = whole
    cube = padded.reshape(3, 3, 3, 2, 2, 3).transpose(0, 3, 1, 4, 2, 5).reshape(6, 54)
    _, s, vt = np.linalg.svd(cube, full_matrices=False)
    left = ((s[:, None] * vt)[: ranks[0]]).reshape(-1, 9)
    second = np.linalg.svd(left, compute_uv=False)
    tails = np.square(s[ranks[0] :]).sum() + np.square(second[ranks[1] :]).sum()
    (said,) = linalg.tt_errors(whole, rows, columns, [ranks])
    assert said == pytest.approx(tails, rel=1e-10)
    # rows that only fill up are not asked for: what is lost there is no loss
    filled = np.square(by_loops(cores, 27)[23:]).sum()
    assert lost + filled == pytest.approx(said, rel=1e-9)


def test_all_ranks_are_the_table() -> None:
    whole, rows, columns = table(27, 12), (3, 3, 3), (2, 2, 3)
    cores = linalg.tt_cores(whole, rows, columns, most_ranks(rows, columns))
    np.testing.assert_allclose(linalg.tt_table(*cores), whole, atol=1e-12)
    np.testing.assert_allclose(by_loops(cores, 27), whole, atol=1e-12)


def test_both_sides_of_a_cut_have_the_same_norms() -> None:
    first, middle, last = linalg.tt_cores(table(64, 8), (4, 4, 4), (2, 2, 2), (5, 4))
    left, right = first.flatten(0, 1).norm(dim=0), last.transpose(1, 2).flatten(0, 1).norm(dim=0)
    assert torch.allclose(left.square(), left.square().sort(descending=True).values)
    # with the roots taken out again, `middle` has rows of the norms of the first cut
    inner = (middle * left[:, None, None] * right).transpose(0, 1).flatten(1).norm(dim=1)
    whole = table(64, 8).view(4, 4, 4, 2, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(8, -1)
    values = torch.linalg.svdvals(whole)[:5]
    assert bool((inner <= values * (1 + 1e-9)).all())
    assert torch.allclose(left.square(), values)


def test_a_zero_table_has_zero_cores() -> None:
    cores = linalg.tt_cores(torch.zeros(9, 4), (3, 2, 2), (2, 1, 2), (2, 2))
    assert not linalg.tt_table(*cores).any()
    assert linalg.tt_errors(torch.zeros(9, 4), (3, 2, 2), (2, 1, 2), [(1, 1), (2, 2)]) == [0, 0]


def test_a_table_of_low_matrix_rank_is_far_from_a_train() -> None:
    """[methods/further.md 2.5] Rank 4 in 4,064 numbers; 6,080 in cores miss 0.625 of its norm."""
    whole = table(1000, 4, 1) @ table(4, 16, 2)
    sides = row_sides(1000), column_sides(16)
    assert sides == ((10, 10, 10), (2, 2, 4))
    (error,) = linalg.tt_errors(whole, *sides, [(16, 16)])
    assert 16 * 20 + 16 * 20 * 16 + 16 * 40 == 6080
    assert (error / float(whole.square().sum())) ** 0.5 == pytest.approx(0.625, abs=0.02)
