"""LoQT: which layer is merged when, and at full rank it is dense training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.train import LoQT
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import Net, batches, run

NAMES = ("first", "second")


def sgd(model: nn.Module, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)


def test_at_full_rank_it_is_gradient_descent() -> None:
    """T15: PPᵀ = 1, the factor holds all that quantisation loses, and merging changes nothing; a
    layer sits out the step that merges it."""
    model, plain = Net().double(), Net().double()
    optimizer = sgd(model)
    controller = LoQT(model, optimizer, rank=100, strength=1.0, gap=6, growth=1.0, rounds=1)
    x, y = next(batches(1))
    x, y = x.double(), y.double()
    for step in range(15):
        out = {"first": step % 6 == 0, "second": step % 6 == 3}
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        plain.zero_grad()
        plain(x, y)["loss"].backward()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if not (name.endswith("weight") and out[name.partition(".")[0]]):
                    parameter -= 0.1 * parameter.grad
    for name in NAMES:
        weight = model.get_submodule(name).dense_weight().detach()
        torch.testing.assert_close(weight, plain.get_submodule(name).weight, rtol=1e-10, atol=1e-12)


def test_between_merges_adam_runs_in_the_rotated_basis() -> None:
    """T15: with P square, W = PB moves as R = PᵀW does under Adam, which is not how W would."""
    model, plain = Net().double(), Net().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    controller = LoQT(model, optimizer, rank=100, strength=1.0, gap=1000, rounds=1)
    x, y = next(batches(1))
    x, y = x.double(), y.double()
    model(x, y)["loss"].backward()
    controller.before_step()
    controller.after_step()  # the first merge, without moving anything
    layers = {name: model.get_submodule(name) for name in NAMES}
    bases = {name: layer.basis.clone() for name, layer in layers.items()}
    numbers = {f"{n}.weight": m.dense_weight().detach().clone() for n, m in layers.items()}
    numbers |= {f"{n}.bias": m.bias.detach().clone() for n, m in layers.items()}
    free = {n: p.clone() for n, p in numbers.items() if n.endswith("bias")}
    for name, layer in layers.items():
        weight = numbers[f"{name}.weight"]
        free[name] = bases[name].T @ (weight if layer.left else weight.T)
    free = {name: p.requires_grad_() for name, p in free.items()}
    rotated = torch.optim.AdamW(free.values(), lr=0.01, weight_decay=0.0)
    plain.load_state_dict(numbers)
    other = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)

    def weights() -> dict[str, torch.Tensor]:
        turned = {name: bases[name] @ free[name] for name in NAMES}
        return {f"{n}.weight": w if layers[n].left else w.T for n, w in turned.items()}

    for _ in range(8):
        for each in (optimizer, rotated, other):
            each.zero_grad()
        model(x, y)["loss"].backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        biases = {name: p for name, p in free.items() if name.endswith("bias")}
        torch.func.functional_call(plain, {**weights(), **biases}, (x, y))["loss"].backward()
        rotated.step()
        plain.zero_grad()
        plain(x, y)["loss"].backward()
        other.step()
    for name, want in weights().items():
        layer = layers[name.partition(".")[0]]
        weight = layer.dense_weight().detach()
        torch.testing.assert_close(weight, want.detach(), rtol=1e-8, atol=1e-10)
        assert float((weight - plain.get_parameter(name)).detach().abs().max()) > 1e-3


def test_layers_take_turns_at_growing_gaps() -> None:
    model = Net()
    optimizer = sgd(model)
    controller = LoQT(model, optimizer, rank=3, gap=10, growth=1.5)
    gathered = []

    def look(step: int) -> None:
        gathered.append(sum(model.get_submodule(n).collecting for n in NAMES))

    run(model, optimizer, controller, 60, each=look)
    merged = [(e["site"], e["step"]) for e in controller.history if e["event"] == "merge"]
    assert [step for name, step in merged if name == "first"] == [0, 10, 25, 47]  # 10, 15, 22
    assert [step for name, step in merged if name == "second"] == [5, 15, 30, 52]
    assert max(gathered) == 1
    every = [e for e in controller.history if e["event"] == "merge"]
    assert all(0 <= e["error"] < 0.02 and 0.3 < e["gradient_energy"] <= 1 for e in every)


def test_a_merge_takes_the_leading_directions_of_the_gradient() -> None:
    model = Net(width=16)
    optimizer = sgd(model, momentum=0.9)
    controller = LoQT(model, optimizer, rank=3, gap=4, growth=1.0)
    run(model, optimizer, controller, 4)
    layer = model.first  # (16, 12): the basis is on the input's side
    x, y = list(batches(5))[4]
    optimizer.zero_grad()
    model(x, y)["loss"].backward()
    gradient = layer.gathered.double().numpy().copy()
    before = layer.dense_weight().detach()
    old, momentum = layer.basis.clone(), optimizer.state[layer.factor]["momentum_buffer"].clone()
    factor = layer.factor
    controller.before_step()
    assert layer.factor is factor
    assert layer.factor.grad is None
    assert layer.gathered is None
    leading = np.linalg.svd(gradient)[2][:3].T
    both = layer.basis.double().numpy()
    np.testing.assert_allclose(both @ both.T, leading @ leading.T, atol=1e-5)
    moved = optimizer.state[layer.factor]["momentum_buffer"]
    torch.testing.assert_close(moved, layer.basis.T @ old @ momentum)
    error = float(((layer.dense_weight() - before).norm() / before.norm()).detach())
    assert error == pytest.approx(controller.history[-1]["error"], rel=1e-3)
    assert 0 < error < 0.01
    kept = np.linalg.norm(gradient @ leading) ** 2 / np.linalg.norm(gradient) ** 2
    assert controller.history[-1]["gradient_energy"] == pytest.approx(kept, rel=1e-4)


def test_only_small_factors_have_a_state() -> None:
    model = Net(width=64)
    optimizer = torch.optim.Adam(model.parameters())
    controller = LoQT(model, optimizer, rank=2, gap=5)
    run(model, optimizer, controller, 12)
    check_same_parameters(optimizer, model)
    moments = {name: optimizer.state[p]["exp_avg"].numel() for name, p in model.named_parameters()}
    assert moments == {
        "first.factor": 2 * 64, "first.bias": 64, "second.factor": 2 * 64, "second.bias": 10
    }  # fmt: skip
    assert model.first.numbers.dtype == torch.int8
    assert model.first.numbers.shape == (64, 12)


def test_momentum_of_the_dense_weight_goes_on() -> None:
    """Attached in mid-training: B has the moment s·PᵀM, as if it had been there."""
    model = Net()
    optimizer = sgd(model, momentum=0.9)
    x, y = next(batches(1))
    model(x, y)["loss"].backward()
    optimizer.step()
    moments = [
        optimizer.state[m.weight]["momentum_buffer"].clone() for m in (model.first, model.second)
    ]
    LoQT(model, optimizer, rank=3, strength=0.25)
    for moment, layer in zip(moments, (model.first, model.second), strict=True):
        turned = moment if layer.left else moment.T
        momentum = optimizer.state[layer.factor]["momentum_buffer"]
        torch.testing.assert_close(momentum, 0.25 * layer.basis.T @ turned)


def test_it_trains_and_ends_dense() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = LoQT(model, optimizer, rank=4, gap=20)
    losses = run(model, optimizer, controller, 150)
    assert sum(losses[-8:]) < 0.2 * sum(losses[:8])
    x = torch.randn(7, 12)
    expected = model(x)
    model = controller.finish()
    assert type(model.first) is type(model.second) is nn.Linear
    torch.testing.assert_close(model(x), expected)
    check_same_parameters(optimizer, model)
    losses = [(model(a, b)["loss"].backward(), optimizer.step()) for a, b in batches(2)]
    LoQT(model, optimizer)  # nothing is claimed any more


def test_weights_stored_the_other_way_round() -> None:
    """transformers' Conv1D holds (in, out), and is what comes back."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(10, 6), Conv1D(4, 10))
    optimizer = sgd(model, momentum=0.9)
    x = torch.randn(8, 6)
    model(x).square().mean().backward()
    optimizer.step()
    moment = optimizer.state[model[0].weight]["momentum_buffer"].clone()  # (6, 10)
    dense = model(x)
    controller = LoQT(model, optimizer, rank=2, gap=2, strength=1.0)
    torch.testing.assert_close(model(x), dense, rtol=0.02, atol=0.02)
    layer = model[0]
    assert not layer.left  # (10, 6)
    momentum = optimizer.state[layer.factor]["momentum_buffer"]
    torch.testing.assert_close(momentum, layer.basis.T @ moment)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
    expected = model(x)
    model = controller.finish()
    assert type(model[0]) is Conv1D
    assert model[0].weight.shape == (6, 10)
    torch.testing.assert_close(model(x), expected)


def test_an_unused_layer_waits() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    optimizer = sgd(model)
    controller = LoQT(model, optimizer, rank=2, gap=2)
    for name in ("b", "b", "a"):
        optimizer.zero_grad()
        model[name](torch.randn(3, 4)).sum().backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
    merged = [(e["site"], e["step"]) for e in controller.history if e["event"] == "merge"]
    assert merged == [("b", 1), ("a", 2)]


def test_under_autocast() -> None:
    model = Net()
    optimizer = sgd(model)
    controller = LoQT(model, optimizer, rank=3, gap=2)
    for x, y in batches(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, y)["loss"]
        loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
    assert model.first.factor.dtype == torch.float32
    assert bool(model.first.dense_weight().isfinite().all())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank, gap and rounds must be >= 1, got 0, 100, 5"),
        ({"gap": 0}, "must be >= 1, got 128, 0, 5"),
        ({"rounds": 0}, "must be >= 1"),
        ({"strength": 0.0}, "need strength > 0 and growth >= 1, got 0.0"),
        ({"growth": 0.9}, "growth >= 1, got 0.5 and 0.9"),
        ({"growth": float("nan")}, "growth >= 1"),
    ],
)
def test_an_option_out_of_range(options: dict[str, Any], said: str) -> None:
    model = Net()
    with pytest.raises(LowrankError, match=said):
        LoQT(model, sgd(model), **options)
    assert type(model.first) is nn.Linear
