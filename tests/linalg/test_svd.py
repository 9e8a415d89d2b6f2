"""The truncated decompositions against NumPy's SVD, and the routes they take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank import linalg
from lowrank.linalg import svd

from .oracle import SHAPES, SPECTRA, excess, grams, orthonormal, root, with_spectrum

GRAMS = list(grams(4))


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which eigenproblems are solved, and their sizes; anything that inverts raises."""
    seen: list[tuple[str, int]] = []

    def watched(name: str):
        solve = getattr(torch.linalg, name)

        def run(matrix: torch.Tensor, *args: object):
            assert matrix.shape[0] == matrix.shape[1]
            seen.append((name, matrix.shape[0]))
            return solve(matrix, *args)

        return run

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("nothing is inverted, and no full SVD is made")

    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, watched(name))
    for name in ("inv", "pinv", "solve", "cholesky", "lstsq", "svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, forbidden)
    return seen


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_rank_is_optimal(spectrum: str, shape: tuple[int, int]) -> None:
    weight = with_spectrum(spectrum, shape)
    for rank in range(1, min(shape) + 1):
        up, down = linalg.factor(weight, rank)
        assert up.shape == (shape[0], rank)
        assert down.shape == (rank, shape[1])
        assert abs(excess(weight, up @ down, rank)) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gram", GRAMS)
def test_every_rank_is_optimal_in_the_norm_of_the_inputs(gram: str, shape: tuple[int, int]) -> None:
    metric = grams(shape[1])[gram]
    for spectrum in SPECTRA:
        weight = with_spectrum(spectrum, shape)
        for rank in (1, 2, 5, min(shape) - 1, min(shape)):
            up, down = linalg.factor(weight, rank, metric)
            assert torch.isfinite(up).all()
            assert torch.isfinite(down).all()
            assert abs(excess(weight, up @ down, rank, metric)) <= 1e-12, (spectrum, rank)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gram", [None, *GRAMS])
def test_energies_are_squared_singular_values(gram: str | None, shape: tuple[int, int]) -> None:
    metric = None if gram is None else grams(shape[1])[gram]
    for spectrum in SPECTRA:
        weight = with_spectrum(spectrum, shape)
        scaled = weight.numpy() @ root(metric, shape[1])
        want = np.linalg.svd(scaled, compute_uv=False) ** 2
        got = linalg.energies(weight, metric)
        assert got.dtype == torch.float64
        assert got.shape == (min(shape),)
        assert (got >= 0).all()
        assert (got.diff() <= 0).all()
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-12 * max(want.sum(), 1e-30))


def test_whitening_by_the_identity_is_the_plain_decomposition() -> None:
    for shape in SHAPES.values():
        weight = with_spectrum("k^-0.5", shape)
        plain = linalg.factor(weight, 7)
        white = linalg.factor(weight, 7, torch.eye(shape[1], dtype=torch.float64))
        torch.testing.assert_close(white[0] @ white[1], plain[0] @ plain[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [1, 7])
def test_a_diagonal_may_be_given_as_a_vector(rank: int, shape: tuple[int, int]) -> None:
    weight = with_spectrum("k^-0.5", shape)
    diagonal = torch.linspace(0, 3, shape[1], dtype=torch.float64)
    whole = torch.diag(diagonal)
    for given in ((linalg.factor, rank), (linalg.output_basis, rank), (linalg.randomised_basis, 3)):
        found = [given[0](weight, given[1], metric) for metric in (diagonal, whole)]
        if given[0] is linalg.factor:
            found = [up @ down for up, down in found]
        torch.testing.assert_close(*found)
    basis = linalg.output_basis(weight, min(shape), diagonal)
    torch.testing.assert_close(*(linalg.energies(weight, metric) for metric in (diagonal, whole)))
    torch.testing.assert_close(*(linalg.carried(weight, basis, m) for m in (diagonal, whole)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_decomposed_in_float64(dtype: torch.dtype) -> None:
    weight = with_spectrum("k^-0.5", (24, 40)).to(dtype)
    up, down = linalg.factor(weight, 6)
    assert up.dtype == down.dtype == torch.float64
    assert abs(excess(weight, up @ down, 6)) <= 1e-12


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_orthogonal_matrices_have_no_best_direction_and_no_trouble(shape: tuple[int, int]) -> None:
    weight = torch.from_numpy(orthonormal(*max((shape, shape[::-1])), np.random.default_rng(0)))
    for matrix in (weight, weight.T):
        up, down = linalg.factor(matrix, 5)
        assert abs(excess(matrix, up @ down, 5)) <= 1e-12


def test_the_zero_matrix_keeps_a_live_side() -> None:
    for shape in SHAPES.values():
        for gram in (None, torch.eye(shape[1], dtype=torch.float64)):
            up, down = linalg.factor(torch.zeros(shape), 4, gram)
            assert torch.equal(up @ down, torch.zeros(shape, dtype=torch.float64))
            longest = torch.maximum(up.norm(dim=0), down.norm(dim=1))
            torch.testing.assert_close(longest, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gram", [None, "good", "few tokens"])
def test_signs_are_fixed(gram: str | None, shape: tuple[int, int]) -> None:
    """Of each component, the largest entry on the orthonormal side is positive."""
    metric = None if gram is None else grams(shape[1])[gram]
    for seed in range(5):
        weight = with_spectrum("k^-0.5", shape, seed)
        up, down = linalg.factor(weight, 9, metric)
        side = down.T if metric is None and shape[0] > shape[1] else up
        largest = side.abs().argmax(dim=0)
        assert (side[largest, torch.arange(9)] > 0).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gram", [None, "good"])
def test_two_runs_agree(gram: str | None, shape: tuple[int, int]) -> None:
    """Also when the eigensolver, as it may, gives every vector with the other sign."""
    metric = None if gram is None else grams(shape[1])[gram]
    weight = with_spectrum("k^-0.5", shape)
    first = linalg.factor(weight, 9, metric)
    assert all(map(torch.equal, first, linalg.factor(weight, 9, metric)))
    solve, turn = torch.linalg.eigh, torch.linalg.qr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", lambda m: _Eigen(solve(m).eigenvectors.neg()))
        assert all(map(torch.equal, first, linalg.factor(weight, 9, metric)))
        patch.setattr(torch.linalg, "qr", lambda m: tuple(part.neg() for part in turn(m)))
        second = linalg.factor(weight, 9, metric)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


class _Eigen:
    def __init__(self, vectors: torch.Tensor) -> None:
        self.eigenvectors = vectors


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gram", [None, "good", "zero"])
def test_eigenproblems_are_on_the_smaller_side(
    gram: str | None, shape: tuple[int, int], problems: list[tuple[str, int]]
) -> None:
    weight = with_spectrum("k^-0.5", shape)
    metric = None if gram is None else grams(shape[1])[gram]
    linalg.energies(weight, metric)
    linalg.factor(weight, 5, metric)
    assert problems == [("eigvalsh", min(shape)), ("eigh", min(shape))]


def test_a_weight_that_requires_grad_is_not_recorded() -> None:
    weight = with_spectrum("k^-2", (6, 9)).requires_grad_()
    up, down = linalg.factor(weight, 2)
    assert not up.requires_grad
    assert not down.requires_grad
    assert not linalg.energies(weight).requires_grad


def test_balanced_components_are_equally_long_and_the_product_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        up = torch.randn(7, 4, generator=generator, dtype=torch.float64) * 100
        down = torch.randn(4, 9, generator=generator, dtype=torch.float64) / 100
        even_up, even_down = linalg.balance(up, down)
        torch.testing.assert_close(even_up.norm(dim=0), even_down.norm(dim=1))
        torch.testing.assert_close(even_up @ even_down, up @ down)


def test_a_component_that_carries_nothing_keeps_its_unit_side() -> None:
    up, down = torch.eye(5, 3).double(), torch.ones(3, 4).double()
    down[1] = 0
    even_up, even_down = linalg.balance(up, down)
    assert torch.equal(even_up[:, 1], up[:, 1])
    assert torch.equal(even_down[1], down[1])
    torch.testing.assert_close(even_up @ even_down, up @ down)
    torch.testing.assert_close(even_up[:, 0].norm(), even_down[0].norm())


def test_gradients_reach_every_component_of_a_rank_deficient_weight() -> None:
    weight = with_spectrum("planted", (24, 40))
    up, down = (part.requires_grad_() for part in linalg.factor(weight, 8))
    ((up @ down) * torch.randn(24, 40).double()).sum().backward()
    assert ((up.grad.norm(dim=0) > 1e-6) | (down.grad.norm(dim=1) > 1e-6)).all()


def test_factors_are_balanced() -> None:
    for shape in SHAPES.values():
        for gram in (None, grams(shape[1])["good"]):
            up, down = linalg.factor(with_spectrum("k^-2", shape), 6, gram)
            torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_tails_sum_from_the_small_end() -> None:
    energy = torch.tensor([1.0, 1e-20, 1e-20, 1e-20], dtype=torch.float64)
    assert linalg.tails(energy).tolist() == pytest.approx([1.0, 3e-20, 2e-20, 1e-20, 0], rel=1e-12)
    assert linalg.tails(energy)[1] > 0  # 1 − 1 would be 0


def test_tails_are_the_errors_of_all_ranks() -> None:
    weight = with_spectrum("k^-0.5", (24, 40))
    found = linalg.tails(linalg.energies(weight))
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    want = [(values[rank:] ** 2).sum() for rank in range(25)]
    np.testing.assert_allclose(found.numpy(), want, atol=1e-12)
    assert found[-1] == 0


@pytest.mark.parametrize("gram", [None, "good", "few tokens"])
@pytest.mark.parametrize("shape", [(120, 160), (160, 120)])
def test_a_sketch_is_near_the_optimum(shape: tuple[int, int], gram: str | None) -> None:
    """Two power iterations and ten extra vectors, on a spectrum that decays slowly."""
    metric = None if gram is None else grams(shape[1])[gram]
    rank = 12
    for seed in range(3):
        weight = with_spectrum("k^-0.5", shape, seed)
        basis = linalg.randomised_basis(weight, rank, metric, seed=seed)
        assert basis.shape == (shape[0], rank)
        eye = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(basis.T @ basis, eye, atol=1e-10, rtol=0)
        scaled = weight.numpy() @ root(metric, shape[1])
        optimum = (np.linalg.svd(scaled, compute_uv=False)[rank:] ** 2).sum()
        error = ((scaled - basis.numpy() @ (basis.numpy().T @ scaled)) ** 2).sum()
        assert optimum * (1 - 1e-12) <= error <= optimum * 1.02


def test_a_sketch_is_exact_where_it_spans_the_weight() -> None:
    weight = with_spectrum("planted", (120, 160))
    basis = linalg.randomised_basis(weight, 5)
    assert abs(excess(weight, basis @ (basis.T @ weight), 5)) <= 1e-12


def test_power_and_oversampling_help() -> None:
    weight = with_spectrum("k^-0.5", (120, 160))

    def error(**options: int) -> float:
        basis = linalg.randomised_basis(weight, 12, **options)
        return linalg.squared_error(weight, basis @ (basis.T @ weight))

    assert error() < error(power=0) < error(power=0, oversample=0)


def test_a_sketch_depends_on_its_seed_alone() -> None:
    weight = with_spectrum("k^-0.5", (60, 80))
    first = linalg.randomised_basis(weight, 6, seed=3)
    torch.manual_seed(99)
    assert torch.equal(first, linalg.randomised_basis(weight, 6, seed=3))
    assert not torch.equal(first, linalg.randomised_basis(weight, 6, seed=4))
    largest = first.abs().argmax(dim=0)
    assert (first[largest, torch.arange(6)] > 0).all()


@pytest.mark.parametrize("gram", [None, "good"])
@pytest.mark.parametrize("shape", [(80, 100), (100, 80)])
def test_small_ranks_of_large_matrices_are_sketched(
    shape: tuple[int, int],
    gram: str | None,
    monkeypatch: pytest.MonkeyPatch,
    problems: list[tuple[str, int]],
) -> None:
    weight = with_spectrum("k^-0.5", shape)
    metric = None if gram is None else grams(shape[1])[gram]
    exact = linalg.factor(weight, 10, metric)
    monkeypatch.setattr(svd, "RANDOMISED_FROM", 79)
    problems.clear()
    up, down = linalg.factor(weight, 10, metric, seed=1)
    assert problems == [("eigh", 20)]  # rank and ten more: the large side was never decomposed
    again = linalg.factor(weight, 10, metric, seed=1)
    other = linalg.factor(weight, 10, metric, seed=2)
    assert torch.equal(up, again[0])
    assert not torch.equal(up, other[0])
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
    error, best = (linalg.squared_error(weight, u @ d, metric) for u, d in ((up, down), exact))
    assert best <= error <= 1.02 * best
    problems.clear()
    whole = linalg.factor(weight, 11, metric)  # more than an eighth: decomposed whole
    assert problems == [("eigh", 80)]
    assert abs(excess(weight, whole[0] @ whole[1], 11, metric)) <= 1e-12


@pytest.mark.parametrize("gram", [None, "good"])
def test_very_large_matrices_are_decomposed_in_float32(
    gram: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svd, "FP64_UP_TO", 23)
    for shape in SHAPES.values():
        weight = with_spectrum("k^-0.5", shape)
        metric = None if gram is None else grams(shape[1])[gram]
        up, down = linalg.factor(weight, 6, metric)
        assert up.dtype == down.dtype == torch.float32
        assert abs(excess(weight, up @ down, 6, metric)) <= 1e-5
        assert linalg.energies(weight, metric).dtype == torch.float64
    assert svd.compute_dtype(23) == torch.float64


def test_autocast_of_the_caller_costs_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "FP64_UP_TO", 1)
    weight = with_spectrum("k^-0.5", (24, 40)).float()
    metric = grams(40)["good"]
    plain = [linalg.factor(weight, 4, metric)[0], linalg.energies(weight, metric)]
    plain += [linalg.randomised_basis(weight, 4, metric)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = [linalg.factor(weight, 4, metric)[0], linalg.energies(weight, metric)]
        cast += [linalg.randomised_basis(weight, 4, metric)]
    assert all(map(torch.equal, plain, cast))
