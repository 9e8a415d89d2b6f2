"""Two tables for one: NumPy's SVD and least squares beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank import linalg

from .test_spatial import normal


def error(table: torch.Tensor, quotient: torch.Tensor, remainder: torch.Tensor, op: str) -> float:
    """Row by row, as the docstring says it."""
    m, found = len(remainder), 0.0
    for i, row in enumerate(table.numpy()):
        q, r = quotient[i // m].numpy(), remainder[i % m].numpy()
        near = {"mult": lambda q=q, r=r: q * r, "add": lambda q=q, r=r: q + r,
                "concat": lambda q=q, r=r: np.concatenate([q, r])}[op]()  # fmt: skip
        found += ((row - near) ** 2).sum()
    return found


@pytest.mark.parametrize("remainders", [3, 4, 6, 8, 12])
def test_a_product_is_the_leading_pair_of_every_column(remainders: int) -> None:
    table = normal(24, 5)
    found = linalg.two_tables(table, remainders, "mult", 5)
    cells = table.numpy().T.reshape(5, -1, remainders)
    tails = [(np.linalg.svd(matrix, compute_uv=False)[1:] ** 2).sum() for matrix in cells]
    assert error(table, *found, "mult") == pytest.approx(sum(tails), rel=1e-10)
    short = min(found, key=len)
    np.testing.assert_allclose(short.square().mean(0), 1, rtol=1e-12)
    assert bool((short.sum(0) >= 0).all())


@pytest.mark.parametrize(("op", "width"), [("add", 6), ("concat", 2), ("concat", 5)])
def test_sums_and_halves_are_least_squares(op: str, width: int) -> None:
    table = normal(20, 6)
    found = linalg.two_tables(table, 4, op, width)
    ids = np.arange(20)
    by_q, by_r = np.eye(5)[ids // 4], np.eye(4)[ids % 4]
    left = 0 if op == "add" else 6 - width
    least = 0.0
    for column, target in enumerate(table.numpy().T):
        design = np.hstack([by_q, by_r]) if op == "add" else (by_q if column < left else by_r)
        fitted = design @ np.linalg.lstsq(design, target, rcond=None)[0]
        least += ((target - fitted) ** 2).sum()
    assert error(table, *found, op) == pytest.approx(least, rel=1e-10)


@pytest.mark.parametrize("op", ["mult", "add", "concat"])
@pytest.mark.parametrize("rows", [17, 18, 20, 23])
def test_a_short_last_row_loses_nothing_that_fits(op: str, rows: int) -> None:
    ids, width = torch.arange(rows), {"concat": 2}.get(op, 6)
    quotient, remainder = (
        normal(-(-rows // 5), 6 - width if op == "concat" else 6),
        normal(5, width),
    )
    q, r = quotient[ids // 5], remainder[ids % 5]
    table = torch.cat([q, r], 1) if op == "concat" else (q * r if op == "mult" else q + r)
    found = linalg.two_tables(table, 5, op, width)
    assert found[0].shape == quotient.shape
    assert error(table, *found, op) < 1e-20


def test_a_zero_table_leaves_gradients_a_way() -> None:
    quotient, remainder = linalg.two_tables(torch.zeros(12, 3), 4, "mult", 3)
    assert torch.equal(quotient, torch.ones(3, 3).double())
    assert torch.equal(remainder, torch.zeros(4, 3).double())


@pytest.mark.parametrize(("op", "share"), [("mult", 0.938), ("add", 0.963)])
def test_a_table_of_low_rank_is_nearly_lost(op: str, share: float) -> None:
    """[methods/further.md 2.2] Of 1000 rows of rank 4, at m = 25: two tables are for training."""
    table = (
        normal(1000, 4) @ torch.randn(4, 16, generator=torch.Generator().manual_seed(2)).double()
    )
    lost = error(table, *linalg.two_tables(table, 25, op, 16), op)
    assert (lost / float(table.square().sum())) ** 0.5 == pytest.approx(share, abs=0.01)
