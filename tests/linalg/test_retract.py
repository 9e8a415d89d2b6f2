"""Growing, shrinking and retracting bases, against numpy and the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.linalg import retract


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def basis(rows: int, rank: int, seed: int = 0) -> torch.Tensor:
    q, _ = np.linalg.qr(gaussian(rows, rank, seed=seed).numpy())
    return torch.from_numpy(q)


@pytest.mark.parametrize("shape", [(7, 3), (5, 5), (9, 1)])
def test_the_retraction_is_the_unique_qr_with_positive_diagonal(shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape)
    matrix[:, 0] *= -1
    q = retract.orthonormal(matrix).numpy()
    r = q.T @ matrix.numpy()
    np.testing.assert_allclose(q.T @ q, np.eye(shape[1]), atol=1e-13)
    np.testing.assert_allclose(q @ r, matrix.numpy(), atol=1e-13)
    assert (np.diag(r) > 0).all()
    np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-13)


def test_a_basis_is_its_own_retraction() -> None:
    u = basis(8, 3)
    torch.testing.assert_close(retract.orthonormal(u), u)


def test_new_directions_span_what_the_gradient_adds() -> None:
    u, g = basis(10, 3), gaussian(10, 3, seed=1)
    more = retract.new_directions(u, g)
    both = torch.cat([u, more], 1).numpy()
    np.testing.assert_allclose(both.T @ both, np.eye(6), atol=1e-13)
    np.testing.assert_allclose(both @ (both.T @ g.numpy()), g.numpy(), atol=1e-12)


def test_a_basis_grows_only_by_what_is_there() -> None:
    u = basis(10, 4)
    inside, one = u @ gaussian(4, 4, seed=2), gaussian(10, 1, seed=3) @ gaussian(1, 4, seed=4)
    assert retract.new_directions(u, inside).shape == (10, 0)
    assert retract.new_directions(u, torch.zeros(10, 4)).shape == (10, 0)
    assert retract.new_directions(u, inside + one).shape == (10, 1)
    assert retract.new_directions(u, gaussian(10, 4, seed=5), most=2).shape == (10, 2)
    wide = basis(6, 4)
    assert retract.new_directions(wide, gaussian(6, 4, seed=6)).shape == (6, 2)
    assert retract.new_directions(basis(4, 4), gaussian(4, 4, seed=7)).shape == (4, 0)


def test_the_strongest_directions_come_first() -> None:
    u = torch.eye(6, 2, dtype=torch.float64)
    g = torch.zeros(6, 2, dtype=torch.float64)
    g[4, 0], g[3, 1] = 1.0, -5.0
    more = retract.new_directions(u, g, most=1)
    assert more.abs().argmax().item() == 3


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.3, 0.9, 1.0])
def test_the_tail_is_the_whole_tail(tolerance: float) -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1, 0.1], dtype=torch.float64)
    rank = retract.tail_rank(values, tolerance)
    sigma = values.numpy()
    fits = [j for j in range(7) if np.linalg.norm(sigma[j:]) <= tolerance * np.linalg.norm(sigma)]
    assert rank == min(fits)


def test_the_smallest_value_counts() -> None:
    # ‖(1, 1)‖ is above this tolerance, ‖(1,)‖ below it: leaving out the last one would cut two.
    values = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)
    assert retract.tail_rank(values, 1.2 / 11**0.5) == 2


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)])
def test_the_right_factor_is_q_not_its_transpose(shape: tuple[int, int]) -> None:
    core = gaussian(*shape, seed=8)
    p, values, q = retract.core_svd(core)
    np.testing.assert_allclose((p * values @ q.T).numpy(), core.numpy(), atol=1e-12)
    np.testing.assert_allclose(values.numpy(), np.linalg.svd(core.numpy(), compute_uv=False))
    largest = p.gather(0, p.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_a_truncation_loses_exactly_its_tail() -> None:
    """T2."""
    u, v, core = basis(12, 6), basis(9, 6, seed=1), gaussian(6, 6, seed=2)
    p, values, q = retract.core_svd(core)
    before = (u @ core @ v.T).numpy()
    for rank in range(1, 7):
        new_u, new_s, new_v, left, right = retract.truncated_usv(u, v, p, values, q, rank)
        after = (new_u @ new_s @ new_v.T).numpy()
        lost = np.linalg.norm(before - after)
        np.testing.assert_allclose(lost, np.linalg.norm(values.numpy()[rank:]), atol=1e-12)
        np.testing.assert_allclose(new_u.T @ new_u, np.eye(rank), atol=1e-13)
        np.testing.assert_allclose(new_v.T @ new_v, np.eye(rank), atol=1e-13)
        np.testing.assert_allclose(left @ core @ right, new_s, atol=1e-12)


def test_rounding_does_not_add_up() -> None:
    """T6: a thousand truncations in fp32 storage keep the bases orthonormal to 1e-6."""
    u, v, core = basis(12, 6).float(), basis(9, 6, seed=1).float(), gaussian(6, 6, seed=2).float()
    for number in range(1000):
        p, values, q = retract.core_svd(core)
        made = retract.truncated_usv(u, v, p, values, q, 6)
        u, core, v = (made[0].float(), made[1].float(), made[2].float())
        core = core + 0.01 * gaussian(6, 6, seed=number).float()
    assert retract.loss_of_orthonormality(u) < 1e-6
    assert retract.loss_of_orthonormality(v) < 1e-6


@pytest.mark.parametrize("tau", [1.0, 1.1, 1.5, 4.0])
def test_the_clamp_bounds_the_condition(tau: float) -> None:
    values = torch.tensor([5.0, 2.0, 1.0, 1e-9], dtype=torch.float64)
    done = retract.clamped(values, tau).numpy()
    assert done[0] / done[-1] <= tau * (1 + 1e-12)
    mean = values.numpy().mean()
    reach = mean * (tau - 1) / (tau + 1)
    np.testing.assert_allclose(done, np.clip(values.numpy(), mean - reach, mean + reach))


def test_values_within_reach_are_left_alone() -> None:
    values = torch.tensor([1.1, 1.0, 0.9], dtype=torch.float64)
    assert torch.equal(retract.clamped(values, 2.0), values)


def test_the_tangent_part_is_the_projection() -> None:
    u, g = basis(8, 3), gaussian(8, 3, seed=1)
    want = (np.eye(8) - u.numpy() @ u.numpy().T) @ g.numpy()
    np.testing.assert_allclose(retract.tangent(u, g).numpy(), want, atol=1e-13)


def test_autocast_and_narrow_storage_do_no_harm() -> None:
    u = basis(16, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = retract.orthonormal(u + 0.1)
        more = retract.new_directions(u, gaussian(16, 4, seed=1).float())
    assert made.dtype == torch.float64
    assert retract.loss_of_orthonormality(made) < 1e-12
    assert retract.loss_of_orthonormality(torch.cat([u.double(), more], 1)) < 1e-6
    assert retract.loss_of_orthonormality(2 * u) == pytest.approx(3.0, abs=1e-5)
