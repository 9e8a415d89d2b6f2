"""GBLR: planted blocks are found, the budget holds at all times, and what is left is exact."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank.nn import BlockLowRankLinear, LowRankLinear
from lowrank.train import GBLR
from lowrank.train.parts.gaudi_form import GaudiLinear
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import Net, fit, of_outputs, one_layer, planted, run, sgd


def two_blocks() -> torch.Tensor:
    """(24, 16) of two rank-one blocks, one of them round the end."""
    rng = torch.Generator().manual_seed(4)
    target = torch.zeros(24, 16, dtype=torch.float64)
    for row, column, high, wide in ((3, 2, 9, 5), (20, 12, 8, 7)):
        u, v = (1 + torch.rand(n, generator=rng, dtype=torch.float64) for n in (high, wide))
        rows = (row + torch.arange(high)) % 24
        columns = (column + torch.arange(wide)) % 16
        target[rows[:, None], columns[None]] += torch.outer(u, v)
    return target


def test_planted_blocks_are_found_within_the_budget() -> None:
    """From plain low rank, which fits exactly with 80 numbers; 46 are left, and 29 are needed."""
    target, limit = two_blocks(), 0.12 * 24 * 16
    model = one_layer(target)
    with torch.no_grad():
        model[0].weight.copy_(target)
    model, _ = lowrank.compress(
        model, rank=2, method="svd", data=None, target_modules="all", align=1, progress=False
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    controller = GBLR(model, optimizer, ratio=0.12, steps=300, rate=5e-3)
    assert controller.numbers == 80
    losses = fit(model, optimizer, controller, target, 450, of_outputs)
    layer = controller.finish()[0]
    assert type(layer) is BlockLowRankLinear
    assert layer.cost().params <= limit
    assert losses[0] < 1e-12
    assert float((layer.dense_weight().detach() - target).norm() / target.norm()) < 1e-3
    values = torch.linalg.svdvals(target)
    best = values[int(limit) // 40 :].norm() / values.norm()  # of low rank within the budget
    assert float(best) > 0.3


def test_the_budget_falls_on_a_line_and_holds() -> None:
    model = Net()
    optimizer = sgd(model)
    controller = GBLR(model, optimizer, ratio=0.3, steps=20, start=0.9, rate=0.02)
    began, whole = controller.numbers, 12 * 16 + 16 * 10
    assert began <= 0.9 * whole
    seen: list[int] = []
    run(model, optimizer, controller, 30, each=lambda _: seen.append(controller.numbers))
    for step, numbers in enumerate(seen, 1):
        line = began + (0.3 * whole - began) * min(step / 20, 1)
        assert numbers <= line
        assert step > 20 or numbers > 0.8 * line  # and no more is cut than that
    fixed = [event for event in controller.history if event["event"] == "fix"]
    assert [event["step"] for event in fixed] == [20, 20]
    assert seen[19:] == [sum(event["numbers"] for event in fixed)] * 11
    model = controller.finish()
    kept = [m.cost().params for m in (model.first, model.second)]
    assert kept == [event["numbers"] for event in fixed]


def test_the_papers_strength() -> None:
    """τ = λ · rate until the budget is met, then none; what lacks at the end is made up."""
    model = Net()
    optimizer = sgd(model)
    controller = GBLR(model, optimizer, ratio=0.3, steps=40, start=0.9, rate=0.01, strength=0.5)
    layers = list(controller.layers.values())
    for layer in layers:
        layer.gather(1.0)
    before = [layer.widths.detach().clone() for layer in layers]
    with torch.no_grad():
        controller._shrink(controller._threshold(0.5))
    for layer, old in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.widths, (old - 0.005).clamp(0, 1))
    controller.ratio = 0.95
    assert controller._threshold(0.5) == 0
    controller.ratio = 0.3
    model = controller.finish()
    assert sum(m.cost().params for m in (model.first, model.second)) <= 0.3 * 352


def by_hand(layer: GaudiLinear) -> np.ndarray:
    """The weight of the rounded blocks, one entry after the other."""
    weight = np.zeros((layer.out_features, layer.in_features))
    sizes = layer.out_features, layer.in_features
    widths, starts = (
        [[round(x * size) for x in t[side].tolist()] for side, size in enumerate(sizes)]
        for t in (layer.widths, layer.starts)
    )
    for k in range(layer.terms):
        for i in range(widths[0][k]):
            for j in range(widths[1][k]):
                row, column = (starts[0][k] + i) % sizes[0], (starts[1][k] + j) % sizes[1]
                weight[row, column] += layer.up[row, k].item() * layer.down[k, column].item()
    return weight


def test_what_is_trained_is_what_is_left(tmp_path: Any) -> None:
    """The blocks of training, by hand; then `finish`, file and reload, all with one function."""
    model = Net().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = GBLR(model, optimizer, ratio=0.4, steps=12, start=0.8, rate=0.02)
    x = torch.randn(64, 12, dtype=torch.float64)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()

    for _ in range(8):
        step()
    layer = model.first
    assert type(layer) is GaudiLinear
    widths = layer.widths.detach() * layer.sizes
    assert float((widths - widths.round()).abs().max()) > 0.1  # it is rounded in the forward pass
    for mode in (True, False):
        layer.train(mode)
        np.testing.assert_allclose(layer.dense_weight().detach(), by_hand(layer), atol=1e-12)
        want = x.numpy() @ by_hand(layer).T + layer.bias.detach().numpy()
        np.testing.assert_allclose(layer(x).detach(), want, atol=1e-12)
    for _ in range(8):
        step()
    want = model(x).detach()
    weights = [by_hand(model.first), by_hand(model.second)]
    model = controller.finish()
    check_same_parameters(optimizer, model)
    for new, weight in zip((model.first, model.second), weights, strict=True):
        assert type(new) is BlockLowRankLinear
        np.testing.assert_allclose(new.dense_weight().detach(), weight, atol=1e-12)
    torch.testing.assert_close(model(x), want, rtol=1e-12, atol=1e-12)
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, Net(seed=3).double())
    assert torch.equal(again(x), model(x))
    assert again.first.spec() == model.first.spec()


def test_a_finished_layer_is_taken_up_again_as_it_is() -> None:
    model = Net()
    controller = GBLR(model, optimizer := sgd(model), ratio=0.4, steps=4)
    run(model, optimizer, controller, 6)
    model = controller.finish()
    x = torch.randn(5, 12)
    want, numbers = model(x), [m.cost().params for m in (model.first, model.second)]
    again = GBLR(model, torch.optim.SGD(model.parameters(), lr=0.1), ratio=0.4)
    torch.testing.assert_close(model(x), want)
    assert [layer.numbers for layer in again.layers.values()] == numbers


def test_the_optimizer_never_steps_on_widths() -> None:
    """Its weight decay would shrink them: their gradients go to the controller, its scale out."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    controller = GBLR(model, optimizer, ratio=0.6, steps=9, rate=0.01)
    layer = controller.layers["first"]
    model(torch.randn(4, 12)).square().sum().backward()
    gradient, widths = layer.widths.grad.clone(), layer.widths.detach().clone()
    assert float(gradient.abs().max()) > 0
    controller.before_step()
    optimizer.step()
    assert torch.equal(layer.widths, widths)
    assert layer.widths not in optimizer.state
    with torch.no_grad():
        layer.descend(0.01, 1)  # Adam's first step has the size of its rate
    moved = (widths - 0.01 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(layer.widths, moved, atol=1e-6, rtol=0)


def test_the_start_is_no_further_than_low_rank() -> None:
    target = planted(rank=9).float()
    model = one_layer(target)
    with torch.no_grad():
        model[0].weight.copy_(target)
    controller = GBLR(model, sgd(model), ratio=0.4)
    lost = controller.history[0]["energy_lost"]
    values = torch.linalg.svdvals(target).square()
    assert 0 < lost <= float(values[int(0.4 * 320) // 36 :].sum() / values.sum()) + 1e-6
    found = model[0].dense_weight().detach()
    measured = float((found - target).square().sum() / target.square().sum())
    assert lost == pytest.approx(measured, abs=1e-6)


def test_what_stays_whole_ends_as_factors_and_what_is_not_smaller_dense() -> None:
    """Taken over from factors, one with room to spare, one without."""
    model = Net()
    model.first = LowRankLinear(12, 16, 2)
    model.second = LowRankLinear(16, 10, 9)
    controller = GBLR(model, optimizer := sgd(model), ratio=0.9)
    controller._fixed = True  # nothing is cut
    x = torch.randn(5, 12)
    want = model(x)
    model = controller.finish()
    assert type(model.first) is LowRankLinear
    assert type(model.second) is nn.Linear
    torch.testing.assert_close(model(x), want)
    check_same_parameters(optimizer, model)


def test_a_layer_that_lost_all_blocks_computes_nothing() -> None:
    """And its two zeros count."""
    model = Net()
    controller = GBLR(model, optimizer := sgd(model), ratio=0.4, steps=2)
    with torch.no_grad():
        controller.layers["first"].widths.zero_()
    controller.ratio = 0.1
    model = controller.finish()
    assert model.first.cost().params == 2
    assert 12 < 2 + model.second.cost().params <= 0.1 * 352
    assert controller.history[-1]["storage"] == "block-lowrank"
    x = torch.randn(5, 12)
    torch.testing.assert_close(model.first(x), model.first.bias.expand(5, -1))
    check_same_parameters(optimizer, model)


def test_a_smoothed_mask_sharpens_and_is_whole_in_evaluation() -> None:
    model = Net()
    controller = GBLR(model, optimizer := sgd(model), ratio=0.5, steps=10, rate=0.02, sigma=1.0)
    layer = controller.layers["first"]
    np.testing.assert_allclose(layer.eval().dense_weight().detach(), by_hand(layer), atol=1e-6)
    smooth = layer.train().dense_weight().detach()
    assert float((smooth - torch.from_numpy(by_hand(layer))).abs().max()) > 0.05
    sigmas = []
    run(model, optimizer, controller, 12, each=lambda _: sigmas.append(float(layer.sigma)))
    assert sigmas[4] == pytest.approx(10)
    assert sigmas[:9] == sorted(sigmas[:9])
    assert sigmas[9:] == [math.inf] * 3
    np.testing.assert_allclose(layer.dense_weight().detach(), by_hand(layer), atol=1e-6)


def test_moments_follow_the_blocks_that_stay() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = GBLR(model, optimizer, ratio=0.25, steps=30, start=0.9, rate=0.05)
    run(model, optimizer, controller, 29)
    layer = controller.layers["first"]
    with torch.no_grad():
        layer.widths[0, 1] = 0
        moment = optimizer.state[layer.up]["exp_avg"].clone()
        alive = (layer.whole > 0).all(0)
        controller._fix()
    kept = (layer.terms, int(alive.sum()))
    assert kept[0] <= kept[1] < len(alive)
    held = optimizer.state[layer.up]["exp_avg"]
    columns = {tuple(column) for column in moment.T.tolist()}
    assert {tuple(column) for column in held.T.tolist()} <= columns
    assert held.shape == layer.up.shape
    check_same_parameters(optimizer, model)
