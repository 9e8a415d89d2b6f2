"""A budget beside a tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank.train import DLRT, TuckerDLRT
from tests.train.loops import net_for, run


@pytest.mark.parametrize(("make", "loose"), [(DLRT, 0.9), (TuckerDLRT, 0.95)])
def test_the_stricter_of_budget_and_tolerance_decides(make: Any, loose: float) -> None:
    ranks = {}
    for tolerance, ratio in ((0.5, None), (0.5, loose), (0.0, 0.3), (None, 0.3), (None, None)):
        model = net_for(make.__name__)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        controller = make(model, optimizer, tolerance=tolerance, ratio=ratio, every=2, min_rank=1)
        run(model, optimizer, controller, 2)
        ranks[tolerance, ratio] = controller.ranks
    assert ranks[0.5, None] == ranks[0.5, loose]
    assert ranks[0.0, 0.3] == ranks[None, 0.3]
    assert ranks[0.5, None] != ranks[None, 0.3] != ranks[None, None]
