"""The training loop: what is kept, and what a bad step does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lowrank import LowrankError
from lowrank.recover.training import Training, fit


def line() -> tuple[nn.Parameter, list[Tensor], list[Tensor]]:
    """y = 3x, from a slope of 1, in batches."""
    x = [torch.linspace(-1, 1, 8) * (1 + i) for i in range(4)]
    return nn.Parameter(torch.ones(1)), x, [3 * each for each in x]


def test_the_best_state_stays() -> None:
    slope, x, y = line()
    came = fit(
        [slope], lambda b: (slope * x[b] - y[b]).square().mean(), [0, 1, 2], [3],
        Training(steps=40, rate=0.1),
    )  # fmt: skip
    assert came.kept
    assert came.after < 0.3 * came.before
    with torch.no_grad():
        assert float((slope * x[3] - y[3]).square().mean()) == pytest.approx(came.after)
    assert slope.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_whose_gradient_is_not_finite_is_left_out(bad: float) -> None:
    slope, x, y = line()
    calls = []

    def loss(batch: int) -> Tensor:
        found = (slope * x[batch] - y[batch]).square().mean()
        if torch.is_grad_enabled():
            calls.append(batch)
            return found * bad if len(calls) in (2, 5) else found
        return found

    came = fit([slope], loss, [0, 1, 2], [3], Training(steps=40, rate=0.1))
    assert len(calls) == 40
    assert came.best_step > 5
    assert came.after < 0.3 * came.before


def test_a_loss_that_is_not_finite_from_the_start() -> None:
    slope = nn.Parameter(torch.ones(1))
    with pytest.raises(LowrankError, match="recovery cannot start"):
        fit([slope], lambda _: slope.sum() * math.nan, [0], [0], Training(steps=3))
    assert slope.tolist() == [1]
