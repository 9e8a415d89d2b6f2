"""Spectral error and angle of the leading directions, against numpy and against known cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowrank import linalg


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(9, 20), (20, 9)])
def test_they_are_what_numpy_finds(shape: tuple[int, int]) -> None:
    w, s = draw(*shape), draw(*shape, seed=1)
    want = np.linalg.norm((w - s).numpy(), 2) / np.linalg.norm(w.numpy(), 2)
    assert linalg.spectral_error(w, s) == pytest.approx(want)
    ours, theirs = (np.linalg.svd(t.numpy())[0][:, :3] for t in (w, s))
    want = math.degrees(math.acos(np.linalg.svd(ours.T @ theirs)[1][-1]))
    assert linalg.subspace_angle(w, s, 3) == pytest.approx(want)


def test_truncation_loses_the_next_value_and_no_direction() -> None:
    w = draw(12, 8)
    u, values, vh = torch.linalg.svd(w, full_matrices=False)
    kept = u[:, :3] * values[:3] @ vh[:3]
    assert linalg.spectral_error(w, kept) == pytest.approx(float(values[3] / values[0]))
    assert linalg.subspace_angle(w, kept, 3) == pytest.approx(0, abs=1e-5)
    assert linalg.subspace_angle(w, w - kept, 3) == pytest.approx(90)


def test_a_small_turn_is_measured() -> None:
    turn = 1e-5  # of a direction, in radians; the cosine is 1 within 1e-10
    w = torch.diag(torch.tensor([3.0, 2.0, 1.0])).double()
    rotation = torch.eye(3).double()
    rotation[0, 0] = rotation[2, 2] = math.cos(turn)
    rotation[0, 2], rotation[2, 0] = -math.sin(turn), math.sin(turn)
    found = linalg.subspace_angle(w, rotation @ w, 1)
    assert found == pytest.approx(math.degrees(turn), rel=1e-4)


def test_large_entries_hold_more_of_the_norm_than_random_ones() -> None:
    """A tenth of the entries of heavy tails (Student's t, three degrees of freedom)."""
    w = draw(128, 128) / (draw(3, 128, 128, seed=1).square().sum(0) / 3).sqrt()
    least = w.abs().flatten().kthvalue(int(0.9 * w.numel())).values
    largest = linalg.spectral_error(w, w * (w.abs() > least))
    by_chance = linalg.spectral_error(w, w * (draw(128, 128, seed=2) > 1.2816))
    assert largest < 0.6 < 0.8 < by_chance


def test_singular_values_do_not_see_directions() -> None:
    """Turned, a weight keeps its spectrum and nothing else; numpy finds the same distance."""
    w = draw(9, 12)
    turned = torch.linalg.qr(draw(9, 9, seed=1)).Q @ w
    assert linalg.spectrum_error(w, turned) == pytest.approx(0, abs=1e-7)
    assert linalg.subspace_angle(w, turned, 3) > 30
    other = w + 0.1 * draw(9, 12, seed=2)
    ours, theirs = (np.linalg.svd(t.numpy(), compute_uv=False) for t in (w, other))
    want = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
    assert linalg.spectrum_error(w, other) == pytest.approx(want)
    assert want < float((w - other).norm() / w.norm())  # Mirsky


def test_zero_weights() -> None:
    zero = torch.zeros(4, 3)
    assert linalg.spectral_error(zero, zero) == 0
    assert linalg.spectral_error(zero, zero + 1) == math.inf
    assert linalg.spectrum_error(zero, zero) == 0
    assert linalg.spectrum_error(zero, zero + 1) == math.inf
