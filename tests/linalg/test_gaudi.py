"""Masks in the frequency domain are the runs that they stand for; closed-form blocks fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.linalg import (
    beyond_runs,
    block_terms,
    gaudi_mask,
    run_mask,
    shrunk,
    whole_widths,
)
from tests.draws import normal


def runs(starts: list[int], widths: list[int], size: int) -> np.ndarray:
    """By hand."""
    found = np.zeros((len(starts), size))
    for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
        for step in range(width):
            found[row, (start + step) % size] = 1
    return found


@pytest.mark.parametrize("size", [1, 2, 7, 12, 63, 64])
def test_at_whole_entries_the_mask_is_the_run(size: int) -> None:
    """To 1e-14, for even and odd sizes, of every width, round the end too."""
    starts = [start for start in range(size) for _ in range(size + 1)]
    widths = [width for _ in range(size) for width in range(size + 1)]
    l, w = (torch.tensor(t, dtype=torch.float64) / size for t in (starts, widths))  # noqa: E741
    want = runs(starts, widths, size)
    np.testing.assert_allclose(gaudi_mask(w, l, size), want, atol=1e-14 * max(size, 8))
    np.testing.assert_allclose(gaudi_mask(w, l + 1, size), want, atol=1e-12)  # cyclic
    assert np.array_equal(run_mask(torch.tensor(starts), torch.tensor(widths), size), want)


@pytest.mark.parametrize("size", [11, 16])
@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_smoothed_it_is_the_run_and_a_gaussian_convolved(size: int, sigma: float) -> None:
    """By a sum of cosines and a cyclic convolution in numpy."""
    run = runs([9], [4], size)[0]
    f = np.minimum(np.arange(size), size - np.arange(size))
    bell = [
        float(np.sum(np.exp(-((f / sigma) ** 2) / 2) * np.cos(2 * np.pi * f * j / size))) / size
        for j in range(size)
    ]
    want = [sum(run[k] * bell[(j - k) % size] for k in range(size)) for j in range(size)]
    mask = gaudi_mask(torch.tensor(4 / size).double(), torch.tensor(9 / size).double(), size, sigma)
    np.testing.assert_allclose(mask, want, atol=1e-7)


def test_a_smooth_bump() -> None:
    """The largest value at σ = 1 of a run of 10 in 64 is 0.38; at σ = 100 the run has its edges."""
    mask = gaudi_mask(torch.tensor(10 / 64), torch.tensor(0.25), 64, torch.tensor(1.0))
    assert float(mask.max()) == pytest.approx(0.38, abs=0.01)
    assert float(mask.diff().abs().max()) < 0.03
    sharp = gaudi_mask(torch.tensor(10 / 64), torch.tensor(0.25), 64, 100.0)
    assert float(sharp[16:26].min()) > 0.9
    assert float(sharp[:16].abs().max()) < 0.1


@pytest.mark.parametrize("sigma", [float("inf"), 2.0])
def test_widths_and_starts_have_gradients(sigma: float) -> None:
    """Those of differences, also of an empty run, which may so grow."""
    w = torch.tensor([0.31, 0.0, 0.92], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0.13, 0.4, 0.77], dtype=torch.float64, requires_grad=True)
    for size in (8, 9):
        assert torch.autograd.gradcheck(lambda a, b: gaudi_mask(a, b, size, sigma), (w, start))  # noqa: B023
    gaudi_mask(w, start, 9, sigma)[1, 4].backward()
    assert float(w.grad[1].abs()) > 0.1


def test_shrinking_is_the_proximal_step() -> None:
    """argmin_w ½(w − v)² + τ|w| within [0, 1], by trying."""
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    for value in (-0.2, 0.05, 0.3, 1.3):
        for threshold in (0.0, 0.1):
            tried = 0.5 * (grid - value).square() + threshold * grid
            found = shrunk(torch.tensor(value), threshold)
            assert float(found) == pytest.approx(float(grid[tried.argmin()]), abs=1e-4)


def test_an_empty_side_empties_the_block() -> None:
    widths = torch.tensor([[0.5, 0.04, 0.9], [0.3, 1.0, 0.06]])
    found = whole_widths(widths, torch.tensor([[10.0], [20.0]]))
    assert found.tolist() == [[5, 0, 9], [6, 0, 1]]


def error(matrix: torch.Tensor, limit: int) -> float:
    terms = block_terms(matrix, limit)
    rows = run_mask(terms.starts[0], terms.widths[0], len(matrix))
    columns = run_mask(terms.starts[1], terms.widths[1], matrix.shape[1])
    assert terms.numbers <= max(limit, 2)
    assert not bool(terms.up[~rows.T].any())
    assert not bool(terms.down[~columns].any())
    return float((matrix - terms.up @ terms.down).norm() / matrix.norm())


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (37, 19), (3, 5)])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_never_further_than_low_rank(shape: tuple[int, int], share: float) -> None:
    matrix = normal(*shape)
    limit = int(share * matrix.numel())
    values = np.linalg.svd(matrix, compute_uv=False)
    best = np.linalg.norm(values[limit // sum(shape) :]) / np.linalg.norm(values)
    assert error(matrix, limit) <= best + 1e-12


def test_blocks_and_low_rank_are_found() -> None:
    """Exactly, at the numbers that they have: 8 blocks on the diagonal, blockwise rank one, plain
    rank three; and both at once."""
    diagonal = torch.block_diag(*(normal(4, 2) @ normal(2, 4) for _ in range(8)))
    assert error(diagonal, 8 * 2 * 8) < 1e-12
    cells = torch.cat(
        [torch.cat([normal(8, 1) @ normal(1, 8) for _ in range(4)]) for _ in range(4)], 1
    )
    assert error(cells, 16 * 16) < 1e-12
    plain = normal(32, 3) @ normal(3, 32)
    assert error(plain, 3 * 64) < 1e-12
    low = torch.linalg.svdvals(diagonal)[:2].square().sum() / diagonal.square().sum()
    assert error(diagonal, 128) < 0.5 * float((1 - low).sqrt())


def test_no_room_is_the_largest_entry() -> None:
    matrix = normal(6, 4)
    terms = block_terms(matrix, 1)
    row, column = divmod(int(matrix.abs().argmax()), 4)
    assert terms.widths.tolist() == [[1], [1]]
    assert terms.starts.tolist() == [[row], [column]]
    assert float((terms.up @ terms.down)[row, column]) == pytest.approx(float(matrix[row, column]))


def test_off_its_run_a_term_holds_what_would_fit() -> None:
    """Any run that grows by an entry fits W better; on the runs nothing changes."""
    matrix = normal(12, 10)
    terms = block_terms(matrix, 44)
    before = float((matrix - terms.up @ terms.down).square().sum())
    up, down = beyond_runs(matrix, terms)
    grew = 0
    for k in range(terms.widths.shape[1]):
        if int(terms.widths[0, k]) == 12:
            continue
        widths = terms.widths.clone()
        widths[0, k] += 1
        rows = run_mask(terms.starts[0], widths[0], 12).T
        columns = run_mask(terms.starts[1], widths[1], 10)
        after = float((matrix - (up * rows) @ (down * columns)).square().sum())
        assert after < before
        grew += 1
    assert grew
    assert torch.equal(up[terms.up != 0], terms.up[terms.up != 0])
