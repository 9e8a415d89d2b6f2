"""Tucker cores: unfoldings, the truncated HOSVD and its bound, against numpy's einsum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.linalg import modes

SIZES = [(6, 5, 3, 3), (4, 7, 3), (5, 4, 2, 3, 2)]


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", SIZES)
def test_an_unfolding_has_the_mode_first(shape: tuple[int, ...]) -> None:
    x = tensor(*shape)
    for mode in range(2):
        want = np.moveaxis(x.numpy(), mode, 0).reshape(shape[mode], -1)
        np.testing.assert_array_equal(modes.unfolded(x, mode).numpy(), want)


def test_modes_are_multiplied_one_by_one() -> None:
    x, a, b = tensor(3, 4, 2, 2), tensor(5, 3, seed=1), tensor(6, 4, seed=2)
    want = np.einsum("pi,qj,ijkl->pqkl", a, b, x)
    np.testing.assert_allclose(modes.times(x, {0: a, 1: b}).numpy(), want, atol=1e-12)


@pytest.mark.parametrize("shape", SIZES)
def test_at_full_rank_nothing_is_lost(shape: tuple[int, ...]) -> None:
    x = tensor(*shape)
    (u0, u1), core = modes.hosvd(x, shape[:2])
    back = np.einsum("oa,ib,ab...->oi...", u0, u1, core)
    np.testing.assert_allclose(back, x.numpy(), atol=1e-12)
    np.testing.assert_allclose(u0.T @ u0, np.eye(shape[0]), atol=1e-12)


@pytest.mark.parametrize("ranks", [(2, 2), (3, 4), (6, 1), (1, 5)])
def test_the_error_is_within_the_tails(ranks: tuple[int, int]) -> None:
    """T8: best of either mode ≤ error ≤ the tails of both together."""
    x = tensor(6, 5, 3, 3)
    (u0, u1), core = modes.hosvd(x, ranks)
    back = np.einsum("oa,ib,ab...->oi...", u0, u1, core)
    lost = ((x.numpy() - back) ** 2).sum()
    tails = []
    for mode, rank in enumerate(ranks):
        flat = np.moveaxis(x.numpy(), mode, 0).reshape(x.shape[mode], -1)
        tails.append((np.linalg.svd(flat, compute_uv=False)[rank:] ** 2).sum())
    assert max(tails) - 1e-9 <= lost <= sum(tails) + 1e-9


def test_a_core_is_cut_like_the_whole() -> None:
    x = tensor(8, 7, 3, 3)
    bases, core = modes.hosvd(x, (6, 5))
    before = np.einsum("oa,ib,ab...->oi...", *bases, core)
    vectors = [modes.mode_svd(core, mode)[0] for mode in (0, 1)]
    fresh, small, maps = modes.truncated_modes(bases, core, vectors, (3, 4))
    after = np.einsum("oa,ib,ab...->oi...", *fresh, small)
    (u0, u1), best = modes.hosvd(torch.from_numpy(before), (3, 4))
    want = np.einsum("oa,ib,ab...->oi...", u0, u1, best)
    np.testing.assert_allclose(after, want, atol=1e-12)
    np.testing.assert_allclose(modes.times(core, dict(enumerate(maps))), small, atol=1e-12)
    for basis in fresh:
        np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)
