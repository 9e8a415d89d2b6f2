"""CondLR: the bound after every step, the Riemannian step against numpy, ranks that only fall."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank.nn import LowRankLinear
from lowrank.train import CondLR
from lowrank.train.parts.optimizer import check_same_parameters, linear_state
from tests.train.loops import Net, fit, one_layer, planted, run


def condition(layer: Any) -> float:
    values = np.linalg.svd(layer.dense_weight(torch.float64).detach().numpy(), compute_uv=False)
    return float(values[0] / values[layer.rank - 1])


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("tau", [1.0, 1.1, 1.5])
def test_the_condition_is_bounded_after_every_step(name: str, tau: float) -> None:
    """T5: of the weight itself, in fp32, 200 steps."""
    model = Net()
    extra = {"momentum": 0.45} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.02, **extra)
    controller = CondLR(model, optimizer, tau=tau, rank=5)

    def looked(step: int) -> None:
        for layer in (model.first, model.second):
            assert condition(layer) <= tau * (1 + 1e-5)
            assert layer.rank == 5

    looked(-1)  # from the start
    losses = run(model, optimizer, controller, 200, each=looked)
    assert losses[-1] < losses[0]
    check_same_parameters(optimizer, model)


def test_what_is_bounded_is_saved_bounded() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = CondLR(model, optimizer, tau=1.5, rank=4)
    run(model, optimizer, controller, 20)
    output = model(torch.ones(1, 12))
    model = controller.finish()
    assert type(model.first) is type(model.second) is LowRankLinear
    assert condition(model.first) <= 1.5 * (1 + 1e-5)
    torch.testing.assert_close(model(torch.ones(1, 12)), output)
    check_same_parameters(optimizer, model)


def riemannian(
    u: np.ndarray, s: np.ndarray, v: np.ndarray, g: np.ndarray, rate: float, scaling: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step of Riemannian gradient descent on U, S, V; g is ∂L/∂W."""

    def one(basis: np.ndarray, gradient: np.ndarray, core: np.ndarray) -> np.ndarray:
        flat = (np.eye(len(basis)) - basis @ basis.T) @ gradient
        values = np.linalg.svd(core, compute_uv=False)
        if scaling == "bound":
            flat = flat * (values[-1] / values[0]) ** 2
        elif scaling == "exact":
            flat = flat @ np.linalg.inv(core @ core.T)
        q, r = np.linalg.qr(basis - rate * flat)
        return q * np.sign(np.diag(r))

    new_u, new_v = one(u, g @ v @ s.T, s), one(v, g.T @ u @ s, s.T)
    return new_u, s - rate * u.T @ g @ v, new_v


@pytest.mark.parametrize("scaling", ["bound", "exact", "none"])
def test_without_a_bound_it_is_riemannian_descent(scaling: Any) -> None:
    """At τ = ∞, against numpy with the projectors written out."""
    target = planted()
    model = one_layer(target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = CondLR(model, optimizer, tau=math.inf, rank=6, scaling=scaling)
    layer = model[0]
    u, s, v = (t.detach().numpy().copy() for t in (layer.u, layer.s, layer.v))
    for _ in range(5):
        u, s, v = riemannian(u, s, v, u @ s @ v.T - target.numpy(), 0.05, scaling)
        fit(model, optimizer, controller, target, 1)
        np.testing.assert_allclose(layer.u.detach(), u, atol=1e-10)
        np.testing.assert_allclose(layer.s.detach(), s, atol=1e-10)
        np.testing.assert_allclose(layer.v.detach(), v, atol=1e-10)


def test_momentum_stays_tangent() -> None:
    target = planted()
    model = one_layer(target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    controller = CondLR(model, optimizer, rank=6)
    fit(model, optimizer, controller, target, 10)
    layer = model[0]
    up = linear_state(optimizer, layer.up.weight)["momentum_buffer"]
    down = linear_state(optimizer, layer.down.weight)["momentum_buffer"].T
    assert up.norm() > 1e-3
    assert float((layer.u.T @ up).detach().abs().max()) < 1e-12
    assert float((layer.v.T @ down).detach().abs().max()) < 1e-12


def test_a_tail_is_cut_before_it_would_be_lifted() -> None:
    """Of a weight of rank 4 the clamp would lift eight zeros; truncated first, it lifts none."""
    target = planted()
    ranks, errors = [], []
    for tolerance in (None, 0.05):
        model = one_layer(target)
        with torch.no_grad():
            model[0].weight.copy_(target)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        controller = CondLR(model, optimizer, tau=5.0, rank=12, tolerance=tolerance)
        ranks.append(controller.ranks["0"])
        errors.append(float((model[0].dense_weight() - target).detach().norm()))
    assert ranks == [12, 4]
    assert errors[0] > 1.0
    assert errors[1] < 1e-12


def test_ranks_fall_only_when_due() -> None:
    target = planted()
    model = one_layer(target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    options: dict[str, Any] = {"tau": math.inf, "tolerance": 0.05, "every": 50}
    controller = CondLR(model, optimizer, rank=12, **options)
    start = controller.ranks["0"]
    fit(model, optimizer, controller, target, 49)
    assert controller.ranks["0"] == start
    fit(model, optimizer, controller, target, 1)
    assert controller.ranks["0"] == 4
    check_same_parameters(optimizer, model)
    lines = [line for line in controller.history if line["event"] == "bound"]
    assert [line["step"] for line in lines] == [0, 50]
    assert lines[-1]["rank"] == 4


def test_a_zero_weight_is_no_error() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    nn.init.zeros_(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = CondLR(model, optimizer, rank=2)
    assert controller.history[-1]["condition"] is None
    model(torch.ones(1, 5)).sum().backward()
    controller.before_step()
    optimizer.step()
    controller.after_step()
    assert bool(torch.isfinite(model(torch.ones(1, 5))).all())


def test_detached_it_bounds_no_more() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = CondLR(model, optimizer, tau=1.1)
    controller.detach()
    run(model, optimizer, controller, 30)
    assert condition(model.first) > 1.1 * (1 + 1e-5)
