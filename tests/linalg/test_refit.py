"""Two-sided factors and refits, against numpy's SVD of the whole problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank import linalg

SHAPES = [(9, 14), (14, 9), (10, 10)]


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gram(size: int, seed: int) -> torch.Tensor:
    rows = normal(4 * size, size, seed=seed) @ normal(size, size, seed=seed + 1)
    return rows.T @ rows / len(rows)


def tail(matrix: torch.Tensor, rank: int) -> float:
    return float((np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:] ** 2).sum())


def symmetric_root(matrix: torch.Tensor) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix.numpy())
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def chol(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.cholesky(matrix)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_root_squares_to_the_damped_matrix(shape: tuple[int, int]) -> None:
    g = gram(shape[0], 1)
    root = linalg.output_root(g, 0.3)
    want = g + 0.3 * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype)
    torch.testing.assert_close(root.T @ root, want)
    assert torch.equal(root, root.triu())
    up = normal(len(g), 3, seed=9)
    torch.testing.assert_close(root @ linalg.unrooted(root, up), up)


def test_the_zero_matrix_has_an_invertible_root() -> None:
    root = linalg.output_root(torch.zeros(4, 4))
    assert bool(torch.isfinite(torch.linalg.inv(root)).all())
    assert float(root.norm()) < 1e-14  # and weighs next to nothing


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_singular_matrix_has_a_root_without_damping(tokens: int, scale: float) -> None:
    rows = normal(tokens, 40, seed=tokens) * scale
    g = rows.T @ rows / tokens
    root = linalg.output_root(g, 0.0)
    torch.testing.assert_close(root.T @ root, g, rtol=0, atol=1e-9 * float(g.diagonal().sum()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damp", [0.1, 0.3])
def test_factors_in_both_norms_are_the_optimum(shape: tuple[int, int], damp: float) -> None:
    """Against NumPy's SVD of the whole problem, with symmetric roots."""
    out, inner = shape
    weight, g, h = normal(out, inner, seed=3), gram(out, 4), gram(inner, 5)
    root = linalg.output_root(g, damp)
    left, right = (
        symmetric_root(g + damp * g.diagonal().mean() * torch.eye(out).double()),
        symmetric_root(h),
    )
    scaled = left @ weight.numpy() @ right
    total = float((scaled**2).sum())
    energy = linalg.energies(root @ weight, h)
    values = np.linalg.svd(scaled, compute_uv=False) ** 2
    np.testing.assert_allclose(energy.numpy(), values, rtol=0, atol=1e-12 * total)
    for rank in (1, 4, 8):
        up, down = linalg.factor(root @ weight, rank, h)
        off = weight - linalg.unrooted(root, up) @ down
        error = float(((left @ off.numpy() @ right) ** 2).sum())
        assert abs(error - values[rank:].sum()) <= 1e-12 * total


@pytest.mark.parametrize("shape", SHAPES)
def test_a_metric_on_the_outputs_alone_is_the_one_sided_problem_of_the_transpose(
    shape: tuple[int, int],
) -> None:
    """Which has no root in it: Ŵᵀ is the whitened factorisation of Wᵀ."""
    weight, g = normal(*shape, seed=3), gram(shape[0], 4)
    root = linalg.output_root(g, 0.1)
    damped = root.T @ root
    up, down = linalg.factor(root @ weight, 3)
    other_down, other_up = linalg.factor(weight.T, 3, damped)
    torch.testing.assert_close(linalg.unrooted(root, up) @ down, (other_down @ other_up).T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dense", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sided", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_refit_is_the_optimum(
    shape: tuple[int, int], dense: float, sided: bool, added: bool
) -> None:
    """E‖S(t − up·down x')‖² for t = (1 − λ)Wx' + λ(Wx + d), measured on the rows themselves."""
    out, inner = shape
    weight = normal(out, inner, seed=3)
    x = normal(200, inner, seed=4)
    lean = x @ normal(inner, inner, seed=5) / 4 + 0.3 * normal(200, inner, seed=6)
    h, cross = lean.T @ lean / 200, x.T @ lean / 200
    root = linalg.output_root(gram(out, 7)) if sided else None
    off = normal(200, out, seed=8) + lean[:, :1] if added else torch.zeros(200, out).double()
    extra = off.T @ lean / 200 if added else None
    up, down = linalg.refit_factors(
        weight, 4, h, cross, share=dense, extra=extra, root=root, ridge=1e-12
    )
    metric = torch.eye(out, dtype=torch.float64) if root is None else root
    targets = ((1 - dense) * lean + dense * x) @ weight.T + dense * off
    found = ((targets - lean @ (up @ down).T) @ metric.T).square().sum() / 200
    # The optimum: regress the targets on x', then truncate in the metric of x'.
    regression = torch.linalg.lstsq(lean, targets).solution.T
    rest = ((targets - lean @ regression.T) @ metric.T).square().sum() / 200
    optimum = float(rest) + tail(metric @ regression @ chol(h), 4)
    assert float(found) == pytest.approx(optimum, rel=1e-6)


def test_refit_to_the_same_stream_is_the_whitened_factor() -> None:
    weight, h = normal(8, 12, seed=1), gram(12, 2)
    products = [
        u @ d for u, d in (linalg.refit_factors(weight, 3, h, h), linalg.factor(weight, 3, h))
    ]
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-3)


def test_an_input_that_is_always_zero_keeps_the_weight() -> None:
    zero = torch.zeros(5, 5, dtype=torch.float64)
    weight = normal(4, 5, seed=1)
    assert torch.equal(linalg.regressed(weight, zero, zero), weight)
    up, down = linalg.refit_factors(weight, 2, zero, zero)
    assert bool(torch.isfinite(up @ down).all())


def test_cross_sums() -> None:
    x, y = normal(30, 4, seed=1).float(), normal(30, 6, seed=2).float()
    torch.testing.assert_close(
        linalg.cross_sum(x, y), x.double().T @ y.double(), rtol=1e-5, atol=1e-5
    )


def test_a_gram_that_rounding_made_indefinite() -> None:
    """One loud input among wide ones: the negative eigenvalues are not inverted."""
    weight, v = normal(6, 12, seed=1), torch.full((12,), 0.01, dtype=torch.float64)
    v[3] = 100
    off = 1e-4 * float(v[3]) ** 2
    loud = torch.outer(v, v) - off * torch.eye(12, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(loud)[0]) < -10 * 1e-4 * float(loud.diagonal().mean()) / 2
    torch.testing.assert_close(linalg.regressed(weight, loud, loud), weight)
    other = linalg.regressed(weight, loud, loud + off * gram(12, 3) / 12)
    assert float((other - weight).norm()) < float(weight.norm())


def test_what_is_all_rounding_keeps_the_weight() -> None:
    """The variance of a constant: `least` says how large its rounding may be."""
    weight = normal(6, 8, seed=1)
    noise = 1e-9 * (normal(8, 8, seed=2) + normal(8, 8, seed=2).T)
    target = 1e-9 * normal(8, 8, seed=3)
    found = linalg.regressed(weight, noise, target, least=1e-6)
    assert float((found - weight).norm()) < 0.05 * float(weight.norm())
    up, down = linalg.refit_factors(weight, 6, noise, target, least=1e-6)
    assert float((up @ down - found).norm()) < 0.05 * float(weight.norm())
