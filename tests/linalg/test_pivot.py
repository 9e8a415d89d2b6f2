"""Pivot rows: what they reproduce, how small the coefficients are, and that the search ends."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank.linalg import mixed_from, pivot_rows, pivoted
from lowrank.linalg.pivot import BOUND, PivotedFactors


def factors(out: int, inner: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=rng, dtype=torch.float64)
    return up, torch.randn(rank, inner, generator=rng, dtype=torch.float64)


def rebuilt(found: PivotedFactors) -> np.ndarray:
    """W in its own order of rows, by NumPy."""
    kept, mix, order = (part.numpy() for part in found)
    weight = np.empty((len(order), kept.shape[1]))
    weight[order[: len(kept)]] = kept
    weight[order[len(kept) :]] = mix @ kept
    return weight


def check(up: Tensor, down: Tensor) -> PivotedFactors:
    """It reproduces up · down, with small coefficients and an order of all rows."""
    found, want = pivoted(up, down, torch.float64), up.numpy() @ down.numpy()
    rank = up.shape[1]
    assert found.kept.shape == down.shape
    assert found.mix.shape == (len(up) - rank, rank)
    assert found.order.sort().values.tolist() == list(range(len(up)))
    np.testing.assert_array_equal(found.kept, (up[found.order[:rank]] @ down).numpy())
    scale = np.linalg.norm(up.numpy()) * np.linalg.norm(down.numpy())
    assert np.abs(rebuilt(found) - want).max() <= 1e-13 * scale
    assert float(found.mix.abs().max()) <= BOUND * (1 + 1e-5)
    return found


@pytest.mark.parametrize("sizes", [(10, 18, 4), (18, 10, 9), (12, 12, 11), (40, 30, 1), (2, 5, 1)])
def test_kept_and_mixed_rows_are_the_product(sizes: tuple[int, int, int]) -> None:
    check(*factors(*sizes))


def graded(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    scale = 10.0 ** -torch.arange(up.shape[1], dtype=torch.float64)
    return up * scale, down


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a column of nothing", lambda up, down: (up * torch.eye(6).double()[0], down)),
        ("equal columns", lambda up, down: (up[:, :1].expand(-1, 6).clone(), down)),
        ("dead rows", lambda up, down: (up, down * torch.eye(6).double()[:, :1])),
        ("zero up", lambda up, down: (up * 0, down)),
        ("zero down", lambda up, down: (up, down * 0)),
        ("all zero", lambda up, down: (up * 0, down * 0)),
        ("graded columns", graded),
        ("two living rows", lambda up, down: (up * (torch.arange(15) < 2)[:, None], down)),
    ],
)
def test_factors_of_a_smaller_true_rank_are_no_special_case(what: str, change: object) -> None:
    up, down = change(*factors(15, 9, 6))  # type: ignore[operator]
    found = check(up, down)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = pivoted(up, down, dtype)
        scale = (up @ down).norm()
        error = np.linalg.norm(rebuilt(rounded) - (up @ down).numpy())
        assert error <= 4 * torch.finfo(dtype).eps * scale, what
        assert torch.equal(rounded.order, found.order)
        assert float(rounded.mix.abs().max()) <= 2 * BOUND


def wilkinson(size: int) -> Tensor:
    """Elimination with row pivoting keeps its first rows; its coefficients grow as 2^size."""
    tall = torch.eye(size + 1, size, dtype=torch.float64) - torch.ones(size + 1, size).tril(-1)
    return tall.double()


def test_exchanges_bound_the_coefficients_where_elimination_does_not() -> None:
    basis = wilkinson(20)
    first = pivot_rows(basis, most=0)
    assert first.tolist() == list(range(20))
    assert float(mixed_from(basis, first).abs().max()) > 1000
    final = pivot_rows(basis)
    assert float(mixed_from(basis, final).abs().max()) <= BOUND * (1 + 1e-5)
    grown = torch.linalg.det(basis[final]).abs() / torch.linalg.det(basis[first]).abs()
    assert grown > 1000  # each exchange multiplies it by more than 2


def test_the_search_can_be_cut_short() -> None:
    basis = wilkinson(20)
    once = pivot_rows(basis, most=1)
    assert len(set(once.tolist()) - set(range(20))) == 1


def test_the_volume_is_near_the_largest_there_is() -> None:
    """Coefficients ≤ 2 bound the volume from below: by Hadamard, 2^r r^(r/2) times less at most."""
    up, _ = factors(9, 3, 3, seed=3)
    basis = torch.linalg.qr(up).Q
    volumes = [np.linalg.det(basis[list(rows)]) for rows in itertools.combinations(range(9), 3)]
    mine = abs(np.linalg.det(basis[pivot_rows(basis)]))
    assert mine * 2**3 * 3**1.5 >= np.abs(volumes).max() >= mine > 0


def test_coefficients_are_refitted_to_the_rounded_pivots() -> None:
    up, down = factors(60, 80, 30)
    want = (up @ down).numpy()
    found = pivoted(up, down, torch.bfloat16)
    assert torch.equal(found.kept, found.kept.bfloat16().double())
    exact = found._replace(mix=pivoted(up, down, torch.float64).mix)
    better, worse = (np.linalg.norm(rebuilt(each) - want) for each in (found, exact))
    assert better < 0.95 * worse
    best = want[found.order[30:]] @ np.linalg.pinv(found.kept.numpy())
    least = np.linalg.norm(best @ found.kept.numpy() - want[found.order[30:]])
    mine = np.linalg.norm((found.mix @ found.kept).numpy() - want[found.order[30:]])
    assert least <= mine <= 1.001 * least


def test_two_runs_agree_and_nothing_given_is_changed() -> None:
    up, down = factors(20, 11, 7)
    before = up.clone(), down.clone()
    one, two = pivoted(up, down, torch.float16), pivoted(up, down, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(up, before[0])
    assert torch.equal(down, before[1])


def test_autocast_does_not_reach_it() -> None:
    up, down = (factor.float() for factor in factors(20, 11, 7))
    want = pivoted(up, down, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = pivoted(up, down, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
