"""Bases that controllers move: they stay on their manifold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank.train import DLRT, CondLR
from tests.train.loops import Net, run


@pytest.mark.parametrize(
    ("make", "settings", "options"),
    [
        (DLRT, {"lr": 0.02, "momentum": 0.9}, {"tolerance": 0.05, "every": 5}),
        (CondLR, {"lr": 0.05, "momentum": 0.45}, {"rank": 5, "every": 10}),
    ],
)
def test_bases_stay_orthonormal_over_a_thousand_steps(
    make: Any, settings: dict[str, float], options: dict[str, Any]
) -> None:
    """T6, fp32, with momentum."""
    model = Net()
    controller = make(model, live := torch.optim.SGD(model.parameters(), **settings), **options)
    run(model, live, controller, 1000)
    lines = [line for line in controller.history if "orthonormality" in line]
    assert max(line["orthonormality"] for line in lines) < 1e-6
    assert lines[-1]["step"] == 1000
