"""Maestro: on a linear map it is the SVD; ranks are found; the model's own code is not touched."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank.nn import LowRankLinear
from lowrank.train import Maestro
from lowrank.train.maestro import lasso_gradient, tail_importance
from lowrank.train.parts.draws import Draws
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import Net, fit, of_outputs, one_layer, planted, run


@pytest.mark.parametrize(("cut", "shape"), [("one", (8, 6)), ("all", (6, 8))])
def test_on_a_linear_map_it_is_the_svd(cut: Any, shape: tuple[int, int]) -> None:
    """T4: every truncation within 1e-3 of the best one, importances within 1 % of the values."""
    target = planted(*shape, rank=5, seed=3)
    values = np.linalg.svd(target, compute_uv=False)
    model = one_layer(target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    controller = Maestro(model, optimizer, lasso=0.0, cut=cut)
    fit(model, optimizer, controller, target, 1500, of_outputs)  # whose hooks cut
    up, down = (w.detach().numpy() for w in (model[0].up.weight, model[0].down.weight))
    for rank in range(1, 7):
        error = np.linalg.norm(target.numpy() - up[:, :rank] @ down[:rank])
        best = np.linalg.norm(values[rank:])
        assert error - best < 1e-3 * np.linalg.norm(values), rank
    np.testing.assert_allclose(controller.importances["0"][:5], values[:5], rtol=0.01)


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), lambda p: torch.optim.Adam(p, lr=0.01)],
)
def test_a_planted_rank_is_found(make: Any) -> None:
    target = planted()
    model = one_layer(target)
    optimizer = make(model.parameters())
    controller = Maestro(model, optimizer, lasso=3e-3, threshold=1e-2)
    assert controller.ranks == {"0": 16}
    for _ in range(8):
        fit(model, optimizer, controller, target, 100, of_outputs)
        controller.end_epoch()
        check_same_parameters(optimizer, model)  # T10
    model = controller.finish()
    assert type(model[0]) is LowRankLinear
    assert model[0].rank == 4
    weight = model[0].dense_weight().detach()
    assert float((weight - target).norm() / target.norm()) < 0.01
    x = torch.randn(3, 16, dtype=target.dtype)
    torch.testing.assert_close(model.train()(x), x @ weight.T)  # no hook is left
    check_same_parameters(optimizer, model)


@pytest.mark.parametrize("along", [0, 1])
def test_the_gradient_of_the_lasso(along: int) -> None:
    """Autograd of the penalty as it is written; zero, not NaN, in a tail of zeros."""
    factor = torch.randn(5, 7, dtype=torch.float64).requires_grad_()
    rank = factor.shape[1 - along]
    tails = [factor[:, i:] if along == 0 else factor[i:] for i in range(rank)]
    sum(tail.norm() for tail in tails).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(lasso_gradient(factor, along), factor.grad)
    for dtype in (torch.float32, torch.float64):
        part = factor.detach().to(dtype)
        (part[:, 3:] if along == 0 else part[3:]).zero_()
        part[0, 0] = torch.finfo(dtype).tiny
        found = lasso_gradient(part, along)
        assert found.isfinite().all()
        assert float((found[:, 3:] if along == 0 else found[3:]).abs().max()) == 0
        tiny = lasso_gradient(torch.full_like(part, torch.finfo(dtype).tiny), along)
        assert tiny.isfinite().all()
        assert float(tiny.abs().max()) <= rank


def test_the_lasso_enters_before_the_step() -> None:
    model = Net()
    controller = Maestro(model, torch.optim.SGD(model.parameters(), lr=0.1), lasso=0.5)
    model(torch.randn(4, 12)).sum().backward()
    layer = model.first
    before = layer.up.weight.grad.clone(), layer.down.weight.grad.clone()
    controller.before_step()
    for weight, plain, along in (
        (layer.up.weight, before[0], 0),
        (layer.down.weight, before[1], 1),
    ):
        expected = plain + 0.5 * lasso_gradient(weight, along)
        torch.testing.assert_close(weight.grad, expected)


def test_a_scaled_loss_scales_the_lasso() -> None:
    """Gradients that a scaler has not divided yet get a penalty that it will divide."""
    found = []
    for scaled in (False, True):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        controller = Maestro(model, optimizer, lasso=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        if scaled:
            controller.attachment.optimizer = type("Wrapper", (), {"optimizer": optimizer})()
            controller.attachment.optimizer.scaler = scaler
        x = torch.linspace(-1, 1, 24).reshape(2, 12)
        scaler.scale(model(x).square().mean()).backward()
        controller.before_step()
        scaler.step(optimizer)
        found.append(model.first.up.weight.detach().clone())
    torch.testing.assert_close(*found)


def test_a_layer_runs_with_its_first_components_alone() -> None:
    model = Net()
    controller = Maestro(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(4, 12)
    while not all(3 <= width < 9 for width in controller._draws.widths().values()):
        controller.on_step()
    (name, width), *more = controller._draws.widths().items()
    assert not more
    other = {"first": "second", "second": "first"}[name]
    layer = model.get_submodule(name)
    seen = torch.randn(4, layer.in_features)
    down, up = layer.down.weight, layer.up.weight
    expected = seen @ down[:width].T @ up[:, :width].T + layer.bias
    torch.testing.assert_close(layer(seen), expected)
    layer(seen).square().sum().backward()
    assert float(up.grad[:, width:].abs().sum()) == float(down.grad[width:].abs().sum()) == 0
    whole = model.get_submodule(other)
    seen = torch.randn(4, whole.in_features)
    torch.testing.assert_close(whole(seen), seen @ whole.dense_weight().T + whole.bias)
    model.eval()  # nothing is cut where the model is evaluated
    weight = model.second.dense_weight() @ torch.tanh(
        model.first.dense_weight() @ x.T + model.first.bias[:, None]
    )
    torch.testing.assert_close(model(x), weight.T + model.second.bias)


def test_every_width_comes_up_once_a_round() -> None:
    draws = Draws("one", 0)
    draws.restart({"a": 3, "b": 2})
    rounds = []
    for _ in range(2):
        seen = []
        for _ in range(5):
            seen += draws.widths().items()
            draws.advance()
        rounds.append(seen)
    every = Counter([("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2)])
    assert Counter(rounds[0]) == Counter(rounds[1]) == every
    assert rounds[0] != rounds[1]
    draws = Draws("all", 0)
    draws.restart({"a": 3, "b": 2})
    seen = []
    for _ in range(3):
        widths = draws.widths()
        assert set(widths) == {"a", "b"}
        seen.append(widths["a"])
        draws.advance()
    assert sorted(seen) == [1, 2, 3]
    orders = set()
    for seed in range(5):
        draws = Draws("one", seed)
        draws.restart({"a": 30})
        orders.add(tuple(draws._orders[0]))
    assert len(orders) == 5


def test_shrinking_keeps_the_state_of_what_stays() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = Maestro(model, optimizer, lasso=0.0, threshold=0.5)
    run(model, optimizer, controller, 5)
    old = model.first
    up, down = old.up.weight.detach().clone(), old.down.weight.detach().clone()
    moment = optimizer.state[old.up.weight]["exp_avg"].clone()
    second = optimizer.state[old.down.weight]["exp_avg_sq"].clone()
    found = tail_importance(old)
    expected = int((found > 0.5 * found[0]).sum())
    controller.end_epoch()
    assert 1 <= expected < 12
    assert model.first.rank == expected
    assert torch.equal(model.first.up.weight, up[:, :expected])
    assert torch.equal(model.first.down.weight, down[:expected])
    state = optimizer.state
    assert torch.equal(state[model.first.up.weight]["exp_avg"], moment[:, :expected])
    torch.testing.assert_close(state[model.first.down.weight]["exp_avg_sq"], second[:expected])
    check_same_parameters(optimizer, model)
    noted = next(event for event in controller.history if event["event"] == "shrink")
    assert noted["rank"] == expected
    assert noted["importance_dropped"] == pytest.approx(float(found[expected] / found[0]))


def test_min_rank_and_a_layer_of_zeros() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = Maestro(model, optimizer, threshold=0.99, min_rank=3, rank=5)
    assert controller.ranks == {"first": 5, "second": 5}
    with torch.no_grad():
        model.first.up.weight.zero_()
    controller.end_epoch()
    assert controller.ranks["first"] == 3


def test_what_is_not_smaller_ends_dense_and_the_rest_saves(tmp_path: Any) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = Maestro(model, optimizer, threshold=0.0, lasso=0.0)
    run(model, optimizer, controller, 3)
    with torch.no_grad():
        model.second.up.weight[:, 2:] = 0
    model.eval()
    x = torch.randn(5, 12)
    expected = model(x)
    model = controller.finish()
    assert type(model.first) is nn.Linear
    assert type(model.second) is LowRankLinear
    assert model.second.rank == 2
    torch.testing.assert_close(model(x), expected)
    check_same_parameters(optimizer, model)
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, Net(seed=3))
    assert torch.equal(again.eval()(x), model(x))


def test_detached_it_trains_on_as_it_is() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = Maestro(model, optimizer)
    controller.detach()
    x = torch.randn(5, 12)
    assert torch.equal(model.train()(x), model.eval()(x))
    assert type(model.first) is LowRankLinear
    wider = nn.Sequential(model, nn.Linear(10, 4))
    again = Maestro(wider, torch.optim.SGD(wider.parameters(), lr=0.1))
    assert set(again.ranks) == {"0.first", "0.second", "1"}


def test_a_drawn_width_does_not_compile_anew() -> None:
    counted = []

    def backend(graph: Any, inputs: Any) -> Any:
        counted.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    losses = run(compiled, optimizer, Maestro(compiled, optimizer, lasso=0.0), 16)
    torch._dynamo.reset()
    assert len(counted) == 1
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    same = run(model, optimizer, Maestro(model, optimizer, lasso=0.0), 16)
    assert losses == pytest.approx(same, abs=1e-6)
