"""Running a model: what a pass leaves behind, and what it keeps meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank.calibration.running import quiet

from .. import zoo


def test_the_cache_is_off_inside_and_on_again() -> None:
    model = zoo.llama()
    assert model.config.use_cache
    with quiet(model):
        assert not model.config.use_cache
        assert model(torch.arange(6)[None]).past_key_values is None
    assert model.config.use_cache


def test_no_pass_over_the_whole_model_keeps_a_cache_of_every_layer() -> None:
    model, kept = zoo.llama().eval(), []
    rows = torch.randint(0, 60, (12, 9))

    def note(_model: Any, _args: object, output: Any) -> None:
        kept.append(output.past_key_values is not None)

    handle = model.register_forward_hook(note)
    calibration = lowrank.calibrate(model, [rows], progress=False)
    lowrank.with_fisher(model, calibration, progress=False)
    small, _ = lowrank.compress(
        model, 0.8, data=[rows], effort=lowrank.Recovery(block_steps=30), progress=False
    )
    lowrank.kl(model, small, [rows])
    handle.remove()
    assert len(kept) > 8
    assert not any(kept)


@pytest.mark.parametrize("whole", [True, False])
def test_what_torch_compile_wraps_is_reached(whole: bool) -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    compiled = torch.compile(inner, backend="eager")
    model = compiled if whole else nn.Sequential(compiled, nn.Linear(8, 8))
    x = torch.randn(16, 8)
    model(x)  # compiled, without any hook
    found = lowrank.calibrate(model, [x], progress=False)
    assert [stats.count for stats in found.statistics.values()] == [16] * (2 if whole else 3)
