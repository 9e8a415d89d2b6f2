"""Neural collapse: zero on a simplex, what the definitions say elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lowrank import LowrankError, linalg

LABELS = torch.arange(40) % 4


def simplex(classes: int, width: int) -> torch.Tensor:
    """The vertices of a simplex, turned and moved."""
    generator = torch.Generator().manual_seed(0)
    vertices = torch.eye(classes, dtype=torch.float64) - 1 / classes
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q
    return vertices @ turn[:classes] + 3


def test_a_simplex_is_collapsed() -> None:
    found = linalg.neural_collapse(simplex(4, 9)[LABELS], LABELS)
    assert found == pytest.approx((0, 0, 0), abs=1e-9)


@pytest.mark.parametrize("width", [3, 20])  # fewer than classes, too
def test_it_is_the_definition(width: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (
        torch.randn(40, width, generator=generator).double()
        + torch.randn(4, width, generator=generator)[LABELS]
    )
    found = linalg.neural_collapse(x, LABELS + 7)  # names of classes do not matter
    h, y = x.numpy(), LABELS.numpy()
    means = np.stack([h[y == c].mean(0) for c in range(4)])
    centred = means - means.mean(0)
    inner, outer = np.cov((h - means[y]).T, bias=True), centred.T @ centred / 4
    assert found.within == pytest.approx(np.trace(inner @ np.linalg.pinv(outer, 1e-9)) / 4)
    lengths = np.linalg.norm(centred, axis=1)
    assert found.norms == pytest.approx(lengths.std() / lengths.mean())
    pairs = [centred[i] @ centred[j] / lengths[i] / lengths[j] for i in range(4) for j in range(i)]
    assert found.angles == pytest.approx(np.mean([abs(c + 1 / 3) for c in pairs]))


def test_one_mean_for_all_classes_is_no_number() -> None:
    same = torch.ones(8, 3)
    assert all(map(math.isnan, linalg.neural_collapse(same, torch.arange(8) % 2)))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LowrankError, match="at least two classes, got 1"):
        linalg.neural_collapse(torch.ones(3, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(LowrankError, match=r"one label for each of 3 rows, got \(2,\)"):
        linalg.neural_collapse(torch.ones(3, 2), torch.zeros(2, dtype=torch.long))
