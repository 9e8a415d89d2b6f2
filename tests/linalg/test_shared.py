"""One input basis for several matrices: the optimum, the split of the rows, the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank import linalg

GROUPS = {"three": ([9, 5, 5], 12), "wide": ([3, 2], 14), "tall": ([16, 11], 6), "one": ([7], 10)}


def drawn(name: str) -> tuple[list[Tensor], Tensor]:
    """W_i (m_i, n) and an ill-conditioned H (n, n)."""
    rows, columns = GROUPS[name]
    rng = np.random.default_rng(3)
    inputs = rng.standard_normal((40, columns)) * np.geomspace(1, 1e-3, columns)
    weights = [torch.from_numpy(rng.standard_normal((m, columns))) for m in rows]
    return weights, torch.from_numpy(inputs.T @ inputs / 40)


def optimum(weights: list[Tensor], gram: Tensor, rank: int, rows: Tensor | None = None) -> float:
    """By numpy's SVD of the stack times a root of H."""
    stack = np.concatenate([w.numpy() for w in weights])
    stack = stack if rows is None else stack * rows.sqrt().numpy()[:, None]
    values = np.linalg.svd(stack @ np.linalg.cholesky(gram.numpy()), compute_uv=False)
    return float((values[rank:] ** 2).sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", GROUPS)
def test_no_common_basis_is_better(name: str, weighted: bool) -> None:
    weights, gram = drawn(name)
    total = sum(map(len, weights))
    rows = torch.linspace(0.1, 4, total, dtype=torch.float64) if weighted else None
    tails = linalg.tails(linalg.shared_energies(weights, gram, row_weights=rows))
    for rank in range(1, len(tails)):
        ups, down = linalg.factor_shared(weights, rank, gram, row_weights=rows)
        assert [tuple(up.shape) for up in ups] == [(len(w), rank) for w in weights]
        assert down.shape == (rank, weights[0].shape[1])
        lost, start = 0.0, 0
        for weight, up in zip(weights, ups, strict=True):
            each = ((weight - up @ down) @ gram * (weight - up @ down)).sum(1)
            part = 1 if rows is None else rows[start : start + len(weight)]
            lost += float((each * part).sum())
            start += len(weight)
        want = optimum(weights, gram, rank, rows)
        assert lost == pytest.approx(want, rel=1e-7, abs=1e-12 * float(tails[0]))
        assert float(tails[rank]) == pytest.approx(want, rel=1e-7, abs=1e-12 * float(tails[0]))


def test_weights_on_rows_move_the_error_to_the_others() -> None:
    weights, gram = drawn("three")
    heavy = torch.cat([torch.full((9,), 100.0), torch.ones(10)]).double()
    lost = {}
    for name, rows in (("even", None), ("heavy", heavy)):
        ups, down = linalg.factor_shared(weights, 4, gram, row_weights=rows)
        pairs = zip(weights, ups, strict=True)
        lost[name] = [linalg.squared_error(weight, up @ down, gram) for weight, up in pairs]
    assert lost["heavy"][0] < lost["even"][0]
    assert sum(lost["heavy"]) > sum(lost["even"])


def test_inputs_are_untouched_and_two_runs_agree() -> None:
    weights, gram = drawn("three")
    before = [w.clone() for w in weights]
    first, down = linalg.factor_shared(weights, 3, gram)
    again, other = linalg.factor_shared(weights, 3, gram)
    assert all(map(torch.equal, weights, before))
    assert all(map(torch.equal, first, again))
    assert torch.equal(down, other)
