"""The exchange and the least squares on a support, against brute force by NumPy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank.linalg.admm import alternate, on_support


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def metric(size: int, seed: int = 0) -> Tensor:
    rows = normal(3 * size, size, seed=seed)
    return rows.T @ rows / len(rows)


def least_squares(target: Tensor, gram: Tensor, mask: Tensor, left: Tensor) -> np.ndarray:
    """argmin ‖L^½ (T − X) G^½‖ of the X on the mask, as one dense system in its entries."""
    places = np.argwhere(mask.numpy())
    one, other = left.numpy(), gram.numpy()
    system = np.array([[one[i, k] * other[j, m] for k, m in places] for i, j in places])
    wanted = (one @ target.numpy() @ other)[mask.numpy()]
    solved = np.zeros(mask.shape)
    solved[mask.numpy()] = np.linalg.solve(system, wanted)
    return solved


class Toy:
    """scale/2 ‖(T − X) G^½‖² and a pattern; no third block. Keeps what it is given."""

    def __init__(self, target: Tensor, gram: Tensor, scale: float = 1.0) -> None:
        self.target, self.gram, self.scale = target, gram, scale
        self.penalties: list[float] = []
        self.duals: list[Tensor] = []

    def free(self, sparse: Tensor, dual: Tensor, rho: float) -> Tensor:
        self.penalties.append(rho)
        pull = self.scale * self.target @ self.gram - dual + rho * sparse
        eye = torch.eye(len(self.gram), dtype=pull.dtype)
        return torch.linalg.solve(self.scale * self.gram + rho * eye, pull, left=False)

    def project(self, wish: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def follow(self, sparse: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        self.duals.append(dual)
        return sparse, dual


class OnMask(Toy):
    mask: Tensor

    def project(self, wish: Tensor) -> tuple[Tensor, Tensor]:
        return wish * self.mask, self.mask


class Largest(Toy):
    count: int

    def project(self, wish: Tensor) -> tuple[Tensor, Tensor]:
        index = wish.abs().topk(self.count, dim=1).indices
        mask = torch.zeros_like(wish, dtype=torch.bool).scatter(1, index, True)
        return wish * mask, mask


def on_mask(scale: float = 1.0) -> tuple[OnMask, Tensor, Tensor]:
    toy = OnMask(normal(4, 6), metric(6), scale)
    toy.mask = normal(4, 6, seed=3) > 0
    return toy, torch.zeros_like(toy.target), toy.mask


# The exchange


def test_on_a_fixed_mask_it_converges_to_the_least_squares() -> None:
    """Both parts agree there, and the dual is what the loss pulls with where nothing may be."""
    toy, start, mask = on_mask()
    sparse, support = alternate(toy, start, mask, iterations=400, weak=0.5, strong=0.5)
    want = least_squares(toy.target, toy.gram, mask, torch.eye(4, dtype=torch.float64))
    np.testing.assert_allclose(sparse, want, atol=1e-9)
    assert torch.equal(support, mask)
    slope = (toy.target - sparse) @ toy.gram  # minus the loss's gradient
    np.testing.assert_allclose(toy.duals[-1][~mask], slope[~mask], atol=1e-9)
    np.testing.assert_allclose(toy.duals[-1][mask], 0, atol=1e-9)


def test_with_a_rising_penalty_too() -> None:
    toy, start, mask = on_mask()
    sparse, _ = alternate(toy, start, mask, iterations=400, weak=0.05, strong=5.0)
    want = least_squares(toy.target, toy.gram, mask, torch.eye(4, dtype=torch.float64))
    np.testing.assert_allclose(sparse, want, atol=1e-6)


def test_the_support_is_mostly_the_best_of_all() -> None:
    """Two of six entries in each row, whose values are then least squares."""
    best = []
    for seed in range(5):
        toy = Largest(normal(8, 6, seed=seed), metric(6, seed=seed + 50))
        toy.count = 2
        start, mask = toy.project(toy.target)
        _, mask = alternate(toy, start, mask, iterations=80, weak=0.1, strong=1.0)
        assert (mask.sum(1) == 2).all()
        for target, chosen in zip(toy.target.numpy(), mask.tolist(), strict=True):
            errors = {
                pair: row_error(target, toy.gram.numpy(), pair)
                for pair in combinations(range(6), 2)
            }
            own = errors[tuple(i for i, kept in enumerate(chosen) if kept)]
            best.append(own <= min(errors.values()) + 1e-9)
    assert sum(best) >= 0.9 * len(best)


def row_error(target: np.ndarray, gram: np.ndarray, support: tuple[int, ...]) -> float:
    root = np.linalg.cholesky(gram)  # G = root rootᵀ
    kept = list(support)
    solved = np.linalg.lstsq(root[kept].T, root.T @ target, rcond=None)[0]
    return float(np.square(root.T @ target - root[kept].T @ solved).sum())


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_duals_scale_with_loss_and_penalty_and_nothing_else_does(scale: float) -> None:
    """Powers of two: bit for bit."""
    one, start, mask = on_mask()
    other, _, _ = on_mask(scale)
    rates = {"weak": 0.25, "strong": 4.0}
    scaled = {name: scale * rate for name, rate in rates.items()}
    sparse, _ = alternate(one, start, mask, iterations=5, **rates)
    same, _ = alternate(other, start, mask, iterations=5, **scaled)
    assert torch.equal(sparse, same)
    for dual, larger in zip(one.duals, other.duals, strict=True):
        assert dual.any()
        assert torch.equal(scale * dual, larger)


def test_the_penalty_rises_geometrically_between_its_ends() -> None:
    toy, start, mask = on_mask()
    alternate(toy, start, mask, iterations=5, weak=0.01, strong=1.0)
    np.testing.assert_allclose(toy.penalties, np.geomspace(0.01, 1, 5), rtol=1e-6)


def test_without_iterations_the_start_comes_back() -> None:
    toy, start, mask = on_mask()
    sparse, support = alternate(toy, start, mask, iterations=0, weak=1.0, strong=1.0)
    assert sparse is start
    assert support is mask


class Halved(OnMask):
    """Its third block halves the unit of `sparse` at every exchange. Keeps what passes by."""

    def free(self, sparse: Tensor, dual: Tensor, rho: float) -> Tensor:
        self.given = sparse, dual
        return super().free(sparse, dual, rho)

    def follow(self, sparse: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
        self.returned = sparse * 2, dual / 2
        return self.returned


def test_it_goes_on_in_the_units_of_the_third_block() -> None:
    toys = []
    for iterations in (1, 2):
        toy = Halved(normal(4, 6), metric(6))
        toy.mask = normal(4, 6, seed=3) > 0
        sparse, _ = alternate(
            toy, normal(4, 6), toy.mask, iterations=iterations, weak=1.0, strong=1.0
        )
        assert sparse is toy.returned[0]
        toys.append(toy)
    for given, returned in zip(toys[1].given, toys[0].returned, strict=True):
        assert torch.equal(given, returned)


@pytest.mark.parametrize("large", [1e9, float("nan")])
def test_it_ends_before_what_runs_away(large: float) -> None:
    toy, start, mask = on_mask()
    first, _ = alternate(toy, start, mask, iterations=1, weak=0.5, strong=0.5)
    toy, start, mask = on_mask()
    project, turn = toy.project, iter([1.0, large, 1.0])
    toy.project = lambda wish: project(wish * next(turn))  # type: ignore[method-assign]
    sparse, _ = alternate(toy, start, mask, iterations=3, weak=0.5, strong=0.5, most=1e3)
    assert torch.equal(sparse, first)
    assert len(toy.duals) == 1


# Least squares on a support


@pytest.mark.parametrize("seed", range(4))
def test_rows_coupled_by_a_metric_of_their_own(seed: int) -> None:
    target, gram, left = normal(5, 4, seed=seed), metric(4, seed=seed), metric(5, seed=seed + 9)
    mask = normal(5, 4, seed=seed + 20) > 0
    values = on_support(
        torch.zeros_like(target), left @ target @ gram, lambda x: left @ x @ gram, mask,
        left.diagonal()[:, None] * gram.diagonal(), apart=False, steps=60,
    )  # fmt: skip
    np.testing.assert_allclose(values, least_squares(target, gram, mask, left), atol=1e-8)
    assert not bool(values[~mask].any())


@pytest.mark.parametrize("apart", [True, False])
def test_rows_that_nothing_couples_are_solved_together_or_apart(apart: bool) -> None:
    """From any start; an empty row stays zero. Apart, a large row costs no other its digits."""
    target, gram = normal(5, 4), metric(4)
    target[1] *= 1e6
    mask = normal(5, 4, seed=20) > 0
    mask[2] = False
    start = normal(5, 4, seed=7) * mask
    values = on_support(
        start, (target - start) @ gram, lambda x: x @ gram, mask, gram.diagonal(), apart=apart,
        steps=80,
    )  # fmt: skip
    want = least_squares(target, gram, mask, torch.eye(5, dtype=torch.float64))
    np.testing.assert_allclose(values, want, atol=1e-8 * (1 if apart else 1e6))
    assert not bool(values[2].any())


@pytest.mark.parametrize("apart", [True, False])
def test_no_step_raises_the_error_of_a_singular_problem(apart: bool) -> None:
    """Three directions of eight carry all: where A is flat, values stay as they are."""
    root = normal(8, 3)
    gram, target = root @ root.T, normal(6, 8, seed=1)
    mask, start = normal(6, 8, seed=2) > -0.5, normal(6, 8, seed=3)
    start = start * mask
    before = float("inf")
    for steps in range(9):
        values = on_support(
            start, (target - start) @ gram, lambda x: x @ gram, mask, gram.diagonal(),
            apart=apart, steps=steps,
        )  # fmt: skip
        error = float(((target - values) @ root).square().sum())
        assert error <= before * (1 + 1e-9)
        before = error
    flat = on_support(
        start, torch.zeros_like(start), torch.zeros_like, mask, torch.zeros(8).double(),
        apart=apart,
    )  # fmt: skip
    assert torch.equal(flat, start)
