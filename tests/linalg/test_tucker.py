"""Tucker-2: planted ranks, the bounds between HOSVD, HOOI and the best, the metric of patches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from lowrank import linalg
from lowrank.linalg import tucker

from .oracle import grams, orthonormal, root

SHAPES = [(8, 6, 9), (6, 8, 9), (5, 5, 1), (3, 12, 4)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def planted(shape: tuple[int, int, int], ranks: tuple[int, int], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    out, into = orthonormal(shape[0], ranks[0], rng), orthonormal(shape[1], ranks[1], rng)
    core = rng.standard_normal((*ranks, shape[2]))
    return torch.from_numpy(np.einsum("op,pjk,ij->oik", out, core, into))


def lost(weight: torch.Tensor, parts: tucker.Parts, gram: torch.Tensor | None = None) -> float:
    return linalg.squared_error(weight.flatten(1), tucker.rebuilt(parts).flatten(1), gram)


def unfoldings(weight: torch.Tensor) -> list[np.ndarray]:
    array = weight.numpy()
    return [array.reshape(len(array), -1), np.moveaxis(array, 1, 0).reshape(array.shape[1], -1)]


def projected(weight: torch.Tensor, ranks: tuple[int, int]) -> float:
    """The HOSVD's squared error, by NumPy's SVD of the unfoldings."""
    bases = [np.linalg.svd(u)[0][:, :r] for u, r in zip(unfoldings(weight), ranks, strict=True)]
    p, q = (basis @ basis.T for basis in bases)
    near = np.einsum("op,pjk,ij->oik", p, weight.numpy(), q)
    return float(((weight.numpy() - near) ** 2).sum())


def test_a_planted_multilinear_rank_is_recovered() -> None:
    weight = planted((8, 9, 6), (3, 4))
    table = linalg.tucker.hosvd_errors(weight) / weight.square().sum()
    assert float(table[3, 4]) < 1e-12
    assert float(table[2, 4]) > 1e-3
    assert float(table[3, 3]) > 1e-3
    parts = tucker.tucker_factors(weight, (3, 4))
    torch.testing.assert_close(tucker.rebuilt(parts), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_table_is_the_projections_error_at_every_size(shape: tuple[int, int, int]) -> None:
    weight = normal(*shape)
    table = tucker.hosvd_errors(weight.float())
    assert table.shape == (shape[0] + 1, shape[1] + 1)
    assert table.dtype == torch.float64
    for ranks in [(1, 1), (2, 3), (3, 2), (shape[0], 2), (3, shape[1]), shape[:2]]:
        want = projected(weight.float().double(), ranks)
        assert float(table[ranks]) == pytest.approx(want, abs=1e-10 * float(weight.square().sum()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [(2, 2), (3, 2), (2, 4), (1, 1)])
def test_hooi_is_below_hosvd_and_that_below_root_two_of_the_best(
    shape: tuple[int, int, int], ranks: tuple[int, int]
) -> None:
    """T8."""
    weight = normal(*shape, seed=sum(ranks))
    hosvd, parts = projected(weight, ranks), tucker.tucker_factors(weight, ranks, sweeps=200)
    hooi = lost(weight, parts)
    tails = [
        (np.linalg.svd(u, compute_uv=False)[r:] ** 2).sum()
        for u, r in zip(unfoldings(weight), ranks, strict=True)
    ]
    assert max(tails) - 1e-9 <= hooi <= hosvd + 1e-9  # no approximation is below a mode's tail
    assert hosvd <= sum(tails) + 1e-9
    assert hosvd**0.5 <= 2**0.5 * hooi**0.5 + 1e-9
    last, core, first = parts
    eye = torch.eye(ranks[0], dtype=torch.float64)
    torch.testing.assert_close(last.T @ last, eye)
    kept = float(weight.square().sum() - core.square().sum())  # the norm identity
    assert hooi == pytest.approx(kept, abs=1e-9)
    assert first.shape == (ranks[1], shape[1])


def test_sweeps_never_raise_the_error_and_lower_it() -> None:
    weight = normal(10, 10, 9, seed=4)
    errors = [lost(weight, tucker.tucker_factors(weight, (3, 4), sweeps=n)) for n in range(8)]
    assert all(b <= a + 1e-10 for a, b in pairwise(errors))
    assert errors[-1] < errors[0] - 1e-3
    assert errors[0] == pytest.approx(projected(weight, (3, 4)))


def test_swapped_modes_show() -> None:
    weight = planted((7, 7, 9), (3, 3))
    last, core, first = tucker.tucker_factors(weight, (3, 3))
    assert lost(weight, (first.T, core, last.T)) > 0.5 * float(weight.square().sum())


@pytest.mark.parametrize("name", grams(24))
def test_the_kernel_for_given_channels_is_the_least_squares_one(name: str) -> None:
    weight, gram = normal(5, 6, 4), grams(24)[name]
    first = torch.from_numpy(orthonormal(6, 3, np.random.default_rng(1)).T)
    kernel, metric, error = tucker.conditioned(weight, first, gram)
    scale = root(gram, 24)
    spread = np.kron(first.numpy(), np.eye(4))
    flat = weight.flatten(1).numpy()
    best = np.linalg.lstsq((spread @ scale).T, (flat @ scale).T, rcond=1e-9)[0].T
    want = (((flat - best @ spread) @ scale) ** 2).sum()
    total = ((flat @ scale) ** 2).sum()
    got = (((flat - kernel.numpy() @ spread) @ scale) ** 2).sum()
    assert got <= want + 1e-6 * total
    assert error == pytest.approx(got, abs=1e-6 * max(total, 1e-30))
    np.testing.assert_allclose(
        metric, spread @ gram.numpy() @ spread.T, atol=1e-9 * float(gram.max() + 1)
    )


def started(weight: torch.Tensor, ranks: tuple[int, int], gram: torch.Tensor) -> tucker.Parts:
    first = tucker.first_of(weight, gram)[: ranks[1]]
    kernel, metric, _ = tucker.conditioned(weight, first, gram)
    return (*tucker.outer(kernel, metric, *ranks), first)


@pytest.mark.parametrize("name", grams(24))
def test_alternation_never_raises_the_error_of_the_outputs(name: str) -> None:
    weight, gram = normal(7, 6, 4, seed=2), grams(24)[name]
    start = started(weight, (3, 3), gram)
    parts, errors = tucker.alternated(weight, start, gram)
    assert errors[0] == lost(weight, start, gram)
    assert errors[-1] == lost(weight, parts, gram)
    assert all(b < a for a, b in pairwise(errors))
    assert [p.shape for p in parts] == [p.shape for p in start]
    assert all(bool(torch.isfinite(p).all()) for p in parts)
    if name in ("good", "identity", "dead inputs"):
        assert errors[-1] < 0.99 * errors[0]


def test_without_a_metric_alternation_is_as_good_as_hooi() -> None:
    weight, ranks = normal(8, 8, 9, seed=3), (3, 4)
    plain = lost(weight, tucker.tucker_factors(weight, ranks, sweeps=100))
    eye = torch.eye(72, dtype=torch.float64)
    _, errors = tucker.alternated(weight, started(weight, ranks, eye), eye, sweeps=60, steps=30)
    assert errors[-1] == pytest.approx(plain, rel=0.01)


def test_outputs_that_fit_are_found_in_the_metric_of_the_patches() -> None:
    """The weight is of low multilinear rank where patches lie; elsewhere it does not matter."""
    rng = np.random.default_rng(5)
    few = torch.from_numpy(rng.standard_normal((10, 24)))
    gram = few.T @ few
    null = torch.from_numpy(np.linalg.svd(few.numpy())[2][10:])
    noise = torch.from_numpy(rng.standard_normal((7, 14))) @ null
    weight = planted((7, 6, 4), (2, 3)) + noise.view(7, 6, 4)
    total = linalg.squared_error(weight.flatten(1), 0 * weight.flatten(1), gram)
    _, errors = tucker.alternated(weight, started(weight, (2, 3), gram), gram, sweeps=40, steps=20)
    assert lost(weight, tucker.tucker_factors(weight, (2, 3)), gram) > 0.05 * total
    assert errors[-1] < 0.02 * total


@pytest.mark.parametrize("name", ["identity", "good", "dead inputs", "few tokens"])
def test_the_channels_for_a_given_core_are_the_least_squares_ones(name: str) -> None:
    """After enough steps; by NumPy's lstsq over all numbers of `first` at once."""
    weight, gram = normal(5, 6, 4, seed=6), grams(24, seed=1)[name]
    last, core, first = started(weight, (3, 2), gram)
    scale = root(gram, 24)
    columns = []
    for j, i in np.ndindex(2, 6):
        one = np.zeros((2, 6))
        one[j, i] = 1
        part = np.einsum("op,pjk,ji->oik", last.numpy(), core.numpy(), one)
        columns.append((part.reshape(5, 24) @ scale).ravel())
    flat = (weight.flatten(1).numpy() @ scale).ravel()
    design = np.stack(columns, 1)
    want = ((flat - design @ np.linalg.lstsq(design, flat, rcond=None)[0]) ** 2).sum()
    found = tucker._nearer(weight, (last, core, first), gram, 200)
    before, after = (lost(weight, (last, core, f), gram) for f in (first, found))
    assert after == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert after < before or name == "few tokens"
