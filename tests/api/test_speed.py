"""prefer="speed": layers that are not faster at the data's shape stay dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.api import applying
from lowrank.nn import LowRankLinear
from tests.zoo import calibration, mlp, unchanged

X = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))


def test_a_layer_that_is_not_faster_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says: layers with 40 inputs gain, the others do not."""
    shapes = []

    def ratio(one: Any, other: Any) -> float:
        example = one.__closure__[0].cell_contents
        shapes.append(tuple(example.shape))
        assert [y.shape for y in one()] == [y.shape for y in other()]
        return 0.5 if example.shape[-1] == 40 else 0.99

    monkeypatch.setattr(applying, "paired_ratio", ratio)
    model = mlp(24, 40, 24)
    dense = model[0]
    state = torch.get_rng_state()
    model, report = lowrank.compress(model, 0.5, data=X, prefer="speed", progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert shapes == [(50, 24), (50, 40)]  # the caller's own
    assert model[0] is dense
    assert isinstance(model[2], LowRankLinear)
    first, second = report.rows()
    assert first["reason"] == "factored it takes 0.99 of the dense layer's time"
    assert (first["method"], first["rank"], first["kept"]) == ("dense", "", "1.000")
    assert second["reason"] == ""
    assert "1 of 2 layers factored" in str(report)
    assert "left dense because factors are not faster: 1; more is kept than planned" in str(report)
    stored = 24 * 40 + model[2].rank * (40 + 24)
    assert report.achieved == stored / (24 * 40 + 40 * 24) > report.plan.kept()
    assert report.params_before - report.params_after == 40 * 24 - model[2].rank * 64


def test_speed_needs_data() -> None:
    model = mlp(24, 40, 24)
    with unchanged(model), pytest.raises(LowrankError, match="prefer='speed' times the layers"):
        lowrank.compress(model, 0.5, prefer="speed")


def test_a_layer_that_the_data_does_not_run_cannot_be_timed() -> None:
    model = mlp(24, 40, 24)
    found = calibration(model, lambda m: m[0](X))
    model, report = lowrank.compress(
        model, 0.5, method="svd", data=found, prefer="speed", target_modules=["2"]
    )
    assert "cannot be timed" in report.sites[0].reason
    assert isinstance(model[2], nn.Linear)


def test_speed_is_measured_for_real() -> None:
    """Whatever the clock says, the report and the model agree."""
    model = mlp(24, 400, 400, 16)
    model, report = lowrank.compress(model, rank=4, data=X, prefer="speed", progress=False)
    for site in report.sites:
        assert isinstance(model.get_submodule(site.name), nn.Linear) == bool(site.reason)
