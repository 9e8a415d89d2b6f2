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


def test_magnitude_pruning_keeps_the_norms_that_were_found() -> None:
    """Of 256 × 256 draws of Student's t with three degrees of freedom, 30 and 10 % kept."""
    found = []
    for seed in range(4):
        chi = draw(3, 256, 256, seed=100 + seed).square().sum(0) / 3
        w = draw(256, 256, seed=seed) / chi.sqrt()
        for share in (0.3, 0.1):
            least = w.abs().flatten().kthvalue(int((1 - share) * w.numel())).values
            found.append(linalg.spectral_error(w, w * (w.abs() > least)))
    assert np.mean(np.reshape(found, (4, 2)), 0) == pytest.approx([0.188, 0.324], rel=0.25)


def test_zero_weights() -> None:
    zero = torch.zeros(4, 3)
    assert linalg.spectral_error(zero, zero) == 0
    assert linalg.spectral_error(zero, zero + 1) == math.inf
