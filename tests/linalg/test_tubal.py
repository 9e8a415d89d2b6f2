"""The tubal SVD against NumPy: its errors, what it gains on iid kernels, the refit in a metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank import linalg

from ..draws import normal
from ..nn.convs import waves

SHAPES = [(6, 4, 3), (4, 7, 3, 2), (5, 5, 2, 2, 2), (3, 5, 1, 4)]


def slices(weight: Tensor) -> np.ndarray:
    """(K, O, I), in the basis of the oracle."""
    return (weight.flatten(2).numpy() @ waves(weight.shape[2:])).transpose(2, 0, 1)


def rebuilt(weight: Tensor, count: int, gram: Tensor | None = None) -> np.ndarray:
    """(O, I · K) of so many components, by the oracle's basis."""
    up, down, ranks = linalg.tubal_factors(weight, count, gram)
    assert len(ranks) == weight[0, 0].numel()
    assert sum(ranks) == count == up.shape[1] == len(down)
    place = np.repeat(np.arange(len(ranks)), ranks)
    found = np.einsum("or,ri,kr->oik", up.numpy(), down.numpy(), waves(weight.shape[2:])[:, place])
    own = linalg.tubal_weight(up, down, ranks, weight.shape[2:])
    np.testing.assert_allclose(own, found, atol=1e-12)
    return found.reshape(len(weight), -1)


def metric(weight: Tensor) -> Tensor:
    """Of patches whose numbers resemble each other."""
    side = weight[0].numel()
    rows = normal(150, side, seed=5) @ (normal(side, side, seed=6) / side + 0.05)
    return rows.T @ rows / 150


@pytest.mark.parametrize("shape", SHAPES)
def test_by_the_weight_it_keeps_the_largest_values_of_all_frequencies(
    shape: tuple[int, ...],
) -> None:
    weight = normal(*shape)
    values = np.sort(np.linalg.svd(slices(weight), compute_uv=False).ravel())[::-1]
    errors = linalg.tubal_errors(weight).numpy()
    assert len(errors) == len(values) + 1
    for count in (1, 2, len(values) // 2, len(values)):
        best = np.square(values[count:]).sum()
        lost = np.square(weight.flatten(1).numpy() - rebuilt(weight, count)).sum()
        np.testing.assert_allclose([errors[count], lost], best, atol=1e-9)
    np.testing.assert_array_equal(linalg.tubal_errors(weight, most=3), errors[:4])


def test_an_iid_kernel_is_nearer_than_unfolded() -> None:
    """64 × 64 × 9 at 16 components a frequency, 18,432 numbers: with Fourier's frequencies, a rank
    of 16 each, 0.614 of the norm are lost, and 0.652 by the SVD of the unfolded weight."""
    weight = normal(64, 64, 3, 3)
    size, count = float(weight.norm()), 16 * 9
    tubal = float(linalg.tubal_errors(weight)[count]) ** 0.5 / size
    spectra = np.linalg.svd(np.fft.fft(weight.flatten(2).numpy()).transpose(2, 0, 1))[1]
    fourier = (np.square(spectra[:, 16:]).sum() / 9) ** 0.5 / size
    rank = count * 128 // (64 + 576)
    unfolded = float(linalg.tails(linalg.energies(weight.flatten(1)))[rank]) ** 0.5 / size
    assert fourier == pytest.approx(0.614, abs=0.005)
    assert tubal == pytest.approx(fourier, abs=0.005)
    assert unfolded == pytest.approx(0.652, abs=0.005)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_a_metric_the_output_side_is_the_least_squares_one(shape: tuple[int, ...]) -> None:
    weight = normal(*shape)
    gram, taps = metric(weight), waves(shape[2:])
    half, w = np.linalg.cholesky(gram.numpy()), weight.flatten(1).numpy()
    errors = linalg.tubal_errors(weight, gram).numpy()
    assert errors[0] == pytest.approx(np.square(w @ half).sum())
    for count in (1, 3, len(errors) // 2):
        _, down, ranks = linalg.tubal_factors(weight, count, gram)
        places = taps[:, np.repeat(np.arange(len(ranks)), ranks)]
        rows = np.einsum("ri,kr->rik", down.numpy(), places).reshape(count, -1)
        best = w @ half @ np.linalg.pinv(rows @ half) @ rows
        lost = np.square((w - best) @ half).sum()
        np.testing.assert_allclose(rebuilt(weight, count, gram), best, atol=1e-7)
        assert errors[count] == pytest.approx(lost, rel=1e-7)
        by_weight = np.square((w - rebuilt(weight, count)) @ half).sum()
        assert lost < by_weight


def test_each_frequency_has_the_metric_of_its_own() -> None:
    """A constant input has one frequency: components of others would do nothing to it."""
    weight, shape = normal(5, 4, 3, 3), (4, 9)
    rows = normal(60, 4, seed=1)[:, :, None].expand(60, *shape).flatten(1)
    rows = rows + 1e-3 * normal(60, 36, seed=2)
    _, _, ranks = linalg.tubal_factors(weight, 4, rows.T @ rows)
    assert ranks == [4] + [0] * 8


def test_what_has_no_energy_keeps_a_side() -> None:
    for weight, gram in (
        (torch.zeros(4, 3, 3).double(), None),
        (torch.zeros(4, 3, 3).double(), metric(torch.zeros(4, 3, 3))),
        (normal(4, 3, 3), torch.zeros(9, 9).double()),
    ):
        up, down, _ = linalg.tubal_factors(weight, 5, gram)
        assert bool(up.isfinite().all())
        assert bool(down.isfinite().all())
        assert bool((up.norm(dim=0) > 0.1).all())
