"""Pursuit and the alternation on it, held against NumPy, brute force and low rank."""

from __future__ import annotations

import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank import linalg
from lowrank.linalg.sparse import SparseCode

from .oracle import grams


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def gaussian() -> Tensor:
    return torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).double()


def union(rows: int, columns: int, atoms: int, count: int, seed: int = 0) -> Tensor:
    """Every row is a mixture of `count` of the atoms."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.randn(atoms, columns, generator=rng, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(atoms, generator=rng)[:count] for _ in range(rows)])
    values = torch.randn(rows, count, generator=rng, dtype=torch.float64)
    return torch.zeros(rows, atoms, dtype=torch.float64).scatter(1, chosen, values) @ basis


def relative(weight: Tensor, code: SparseCode, gram: Tensor | None = None) -> float:
    near = code.coefficients() @ code.basis
    return (
        linalg.squared_error(weight, near, gram)
        / linalg.squared_error(weight, torch.zeros_like(weight), gram)
    ) ** 0.5


def svd_error(weight: Tensor, rank: int, gram: Tensor | None = None) -> float:
    tails = linalg.tails(linalg.energies(weight, gram))
    return float(tails[rank] / tails[0]) ** 0.5


# Pursuit


@pytest.mark.parametrize("rounds", [None, 1, 3])
def test_on_an_orthonormal_basis_it_keeps_the_largest_coefficients(rounds: int | None) -> None:
    basis = torch.linalg.qr(normal(20, 20)).Q
    products = normal(30, 20, seed=1) @ basis.T
    value, index = linalg.pursuit(products, torch.eye(20).double(), 7, rounds=rounds)
    want = np.sort(np.argsort(-np.abs(products.numpy()), axis=1)[:, :7], axis=1)
    np.testing.assert_array_equal(index.numpy(), want)
    np.testing.assert_allclose(value, products.gather(1, index), atol=1e-12)


@pytest.mark.parametrize("rounds", [None, 2])
def test_the_rest_never_grows_and_is_orthogonal_to_the_atoms(rounds: int | None) -> None:
    basis = torch.nn.functional.normalize(normal(24, 16), dim=1)  # overcomplete, coherent
    rows, before = normal(10, 16, seed=1), torch.full((10,), torch.inf).double()
    for count in range(1, 17):
        value, index = linalg.pursuit(rows @ basis.T, basis @ basis.T, count, rounds=rounds)
        rest = rows - linalg.spread(value, index, 24) @ basis
        inner = (rest @ basis.T).gather(1, index)
        np.testing.assert_allclose(inner, 0, atol=1e-7)
        if rounds is None:  # its supports are nested
            assert (rest.norm(dim=1) <= before + 1e-9).all()
            before = rest.norm(dim=1)


def test_one_row_at_a_time_gives_the_same() -> None:
    """The textbook's loop with NumPy's lstsq, a row after the other."""
    basis = torch.nn.functional.normalize(normal(12, 9), dim=1).numpy()
    rows = normal(6, 9, seed=1).numpy()
    value, index = linalg.pursuit(
        torch.from_numpy(rows @ basis.T), torch.from_numpy(basis @ basis.T), 4
    )
    for row, values, chosen in zip(rows, value.numpy(), index.tolist(), strict=True):
        support: list[int] = []
        rest = row
        for _ in range(4):
            score = np.abs(basis @ rest)
            score[support] = -1
            support.append(int(score.argmax()))
            solved = np.linalg.lstsq(basis[support].T, row, rcond=None)[0]
            rest = row - solved @ basis[support]
        assert chosen == sorted(support)
        np.testing.assert_allclose(values, solved[np.argsort(support)], atol=1e-8)


def test_rows_are_solved_in_parts_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["lowrank.linalg.sparse"]
    basis = torch.nn.functional.normalize(normal(12, 9), dim=1)
    products = normal(7, 9, seed=1) @ basis.T
    whole = linalg.pursuit(products, basis @ basis.T, 4)
    sizes: list[int] = []
    real = module.safe_root
    monkeypatch.setattr(module, "safe_root", lambda m: sizes.append(m.numel()) or real(m))
    monkeypatch.setattr(module, "CHUNK", 3 * 16)
    parted = linalg.pursuit(products, basis @ basis.T, 4)
    assert max(sizes) <= 48
    assert torch.equal(parted[1], whole[1])
    torch.testing.assert_close(parted[0], whole[0])


def test_two_atoms_cannot_beat_the_best_pair() -> None:
    basis, rows = torch.nn.functional.normalize(normal(7, 5), dim=1), normal(8, 5, seed=1)
    value, index = linalg.pursuit(rows @ basis.T, basis @ basis.T, 2)
    found = (rows - linalg.spread(value, index, 7) @ basis).square().sum(1).numpy()
    pairs = [basis[list(pair)].numpy().T for pair in combinations(range(7), 2)]
    best = [min(np.linalg.lstsq(p, row, rcond=None)[1][0] for p in pairs) for row in rows.numpy()]
    assert (found >= np.array(best) - 1e-9).all()
    assert found.sum() <= 1.5 * sum(best)


def test_equal_atoms_and_zero_rows_do_no_harm() -> None:
    basis = torch.nn.functional.normalize(normal(3, 6), dim=1).repeat(2, 1)
    basis = torch.cat([basis, torch.zeros(1, 6).double()])
    rows = torch.cat([normal(4, 6, seed=1), torch.zeros(2, 6).double()])
    value, index = linalg.pursuit(rows @ basis.T, basis @ basis.T, 5)
    assert value.isfinite().all()
    assert (index.diff(dim=1) > 0).all()
    rest = rows - linalg.spread(value, index, 7) @ basis
    optimum = rows - rows @ torch.linalg.pinv(basis) @ basis
    np.testing.assert_allclose(rest.norm(dim=1), optimum.norm(dim=1), atol=1e-6)


# The alternation


@pytest.mark.parametrize("name", ["identity", "good", "dead inputs", "few tokens", "zero"])
@pytest.mark.parametrize("size", [(10, 3), (24, 6), (50, 5)])  # 50 atoms: more than either side
def test_every_row_has_so_many_atoms_under_any_gram(name: str, size: tuple[int, int]) -> None:
    weight = normal(32, 24)
    code = linalg.dense_sparse_code(weight, *size, grams(24)[name], iterations=4)
    assert code.basis.shape == (size[0], 24)
    assert code.value.shape == code.atoms.shape == (32, size[1])
    assert (code.atoms.diff(dim=1) > 0).all()
    assert ((code.coefficients() != 0).sum(1) <= size[1]).all()
    assert code.basis.isfinite().all()
    assert code.value.isfinite().all()


def test_with_all_atoms_it_is_the_best_of_that_rank() -> None:
    weight, gram = normal(20, 30), grams(30)["good"]
    for metric in (None, gram):
        code = linalg.dense_sparse_code(weight, 6, 6, metric)
        assert relative(weight, code, metric) == pytest.approx(svd_error(weight, 6, metric), 1e-9)


PLANTED = union(256, 256, 64, 6)


@pytest.mark.parametrize(
    ("weight", "size", "rank", "noted"),
    [
        (gaussian(), (64, 16), 40, 0.661),
        (gaussian(), (64, 6), 35, 0.743),
        (PLANTED, (64, 16), 40, 0.253),
        (PLANTED, (32, 8), 20, 0.552),
    ],
    ids=["gaussian 16", "gaussian 6", "union 16", "union 8"],
)
def test_it_is_nearer_than_low_rank_of_equal_size(
    weight: Tensor, size: tuple[int, int], rank: int, noted: float
) -> None:
    """The specification's figures are of another start; none of ours may be worse by 2 %."""
    assert rank * 512 >= sum(size) * 256  # low rank has no fewer numbers
    found = relative(weight, linalg.dense_sparse_code(weight, *size))
    assert found < svd_error(weight, rank)
    assert found <= 1.02 * noted


def test_iterations_lower_the_error_of_the_start() -> None:
    errors = [
        relative(PLANTED, linalg.dense_sparse_code(PLANTED, 64, 8, iterations=n))
        for n in (0, 20, 80)
    ]
    assert errors[0] > 1.05 * errors[1] > 1.05 * errors[2]


def test_it_serves_the_outputs() -> None:
    """Fitted to the inputs it is nearer at the outputs, and farther from the weight."""
    rows = normal(400, 24, seed=1) * torch.logspace(0, -2, 24).double()
    weight, gram = normal(40, 24), rows.T @ rows / 400
    aware, blind = (linalg.dense_sparse_code(weight, 12, 4, metric) for metric in (gram, None))
    assert relative(weight, aware, gram) < 0.8 * relative(weight, blind, gram)
    assert relative(weight, aware) > relative(weight, blind)


@pytest.mark.parametrize("seed", range(6))
def test_lines_are_found_whole(seed: int) -> None:
    """Every row a multiple of one of five atoms: nothing is lost, whatever the inputs are."""
    weight = union(24, 12, 5, 1, seed=seed)
    for gram in (None, grams(12)["good"], grams(12)["dead inputs"]):
        assert relative(weight, linalg.dense_sparse_code(weight, 5, 1, gram), gram) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_any_dtype_and_of_zeros(dtype: torch.dtype) -> None:
    for weight in (normal(12, 9).to(dtype), torch.zeros(12, 9, dtype=dtype)):
        code = linalg.dense_sparse_code(weight, 5, 2)
        assert code.basis.dtype == torch.float64
        assert (code.basis.norm(dim=1) > 0).all()
        assert relative(weight, code) < 1 if weight.any() else not code.value.any()


def test_both_sides_are_equally_long() -> None:
    code = linalg.dense_sparse_code(1e6 * normal(20, 16), 8, 3)
    np.testing.assert_allclose(code.basis.norm(dim=1), code.coefficients().norm(dim=0), rtol=1e-9)


def test_the_draw_of_further_atoms_is_seeded() -> None:
    weight = normal(20, 8)
    one, same, other = (linalg.dense_sparse_code(weight, 15, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.basis, same.basis)
    assert not torch.equal(one.basis, other.basis)


@pytest.mark.parametrize("side", ["out", "in"])
def test_a_basis_that_runs_away_does_no_harm(
    side: linalg.Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not held back it does: then the start is what comes out, or something nearer."""
    module = sys.modules["lowrank.linalg.sparse"]
    monkeypatch.setattr(module, "HELD", 0.0)
    weight, gram = normal(48, 48), grams(48)["good"]
    start, code = (
        linalg.dense_sparse_code(weight, 30, 3, gram, side=side, iterations=n) for n in (0, 400)
    )
    errors = []
    for one in (start, code):
        near = one.coefficients() @ one.basis
        near = near if side == "out" else near.T
        errors.append(linalg.squared_error(weight, near, gram))
    assert errors[1] <= errors[0] * (1 + 1e-9)


# By columns


@pytest.mark.parametrize("name", ["identity", "good", "dead inputs", "few tokens", "zero"])
@pytest.mark.parametrize("size", [(10, 3), (24, 6), (50, 5)])
def test_every_column_has_so_many_atoms_under_any_gram(name: str, size: tuple[int, int]) -> None:
    weight, gram = normal(32, 24), grams(24)[name]
    code = linalg.dense_sparse_code(weight, *size, gram, side="in", iterations=4)
    assert code.basis.shape == (size[0], 32)
    assert code.value.shape == code.atoms.shape == (24, size[1])
    assert (code.atoms.diff(dim=1) > 0).all()
    assert code.basis.isfinite().all()
    assert code.value.isfinite().all()
    near = (code.coefficients() @ code.basis).T
    most = linalg.squared_error(weight, torch.zeros_like(weight), gram)
    assert linalg.squared_error(weight, near, gram) <= most


def test_without_data_it_is_the_code_of_the_transpose() -> None:
    weight = normal(20, 30)
    one = linalg.dense_sparse_code(weight, 8, 3, side="in", iterations=20)
    other = linalg.dense_sparse_code(weight.T, 8, 3, iterations=20)
    assert relative(weight.T, one) == pytest.approx(relative(weight.T, other), rel=0.02)


def test_by_columns_with_all_atoms_it_is_the_best_of_that_rank() -> None:
    weight, gram = normal(20, 30), grams(30)["good"]
    code = linalg.dense_sparse_code(weight, 6, 6, gram, side="in")
    error = linalg.squared_error(weight, (code.coefficients() @ code.basis).T, gram)
    assert error == pytest.approx(float(linalg.tails(linalg.energies(weight, gram))[6]), rel=1e-9)


def test_by_columns_it_serves_the_outputs() -> None:
    """Correlated inputs: values and atoms fitted to them are nearer at the outputs."""
    rng = torch.Generator().manual_seed(1)
    mixed = torch.randn(400, 24, generator=rng).double() @ normal(24, 24, seed=2)
    weight, gram = normal(40, 24), mixed.T @ mixed / 400
    errors = []
    for metric in (gram, None):
        code = linalg.dense_sparse_code(weight, 12, 4, metric, side="in")
        errors.append(linalg.squared_error(weight, (code.coefficients() @ code.basis).T, gram))
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("side", ["out", "in"])
def test_basis_and_values_are_least_squares_on_the_support(side: linalg.Side) -> None:
    """NumPy's lstsq for one when the other is held gains next to nothing."""
    weight, gram = normal(16, 12), grams(12)["good"]
    code = linalg.dense_sparse_code(weight, 6, 2, gram, side=side)
    root = np.linalg.cholesky(gram.numpy()).T  # H = rootᵀ root
    target, found = weight.numpy(), code.coefficients().numpy()
    near = found @ code.basis.numpy()
    near = near if side == "out" else near.T
    error = np.square((target - near) @ root.T).sum()
    if side == "out":
        basis = np.linalg.lstsq(found, target, rcond=None)[0]
        best = np.square((target - found @ basis) @ root.T).sum()
    else:
        basis = np.linalg.lstsq(root @ found, root @ target.T, rcond=None)[0]
        best = np.square(root @ (target.T - found @ basis)).sum()
    assert best <= error * (1 + 1e-9)
    assert error <= 1.001 * best
