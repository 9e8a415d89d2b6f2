"""Cuttlefish and Pufferfish switch when they should; decay of the product; InRank grows."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.nn import LowRankLinear
from lowrank.train import Cuttlefish, FrobeniusDecay, InRank, Pufferfish
from lowrank.train.cuttlefish import estimate, movement
from lowrank.train.inrank import explaining
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import Net, batches, one_layer, planted, run


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def product(model: nn.Module, name: str) -> np.ndarray:
    module = model.get_submodule(name)
    dense = module.dense_weight() if isinstance(module, LowRankLinear) else module.weight
    return dense.detach().double().numpy().copy()


def test_pufferfish_switches_by_the_clock() -> None:
    """The switch is a truncated SVD at a quarter of the full rank; other state goes on."""
    model = Net()
    optimizer = sgd(model)
    controller = Pufferfish(model, optimizer, epochs=2, exclude_modules=["second"])
    run(model, optimizer, controller, 4)
    controller.end_epoch()
    assert type(model.first) is nn.Linear
    assert controller.switched is None
    run(model, optimizer, controller, 8, start=4)
    before = product(model, "first")
    bias = model.first.bias
    momentum = optimizer.state[bias]["momentum_buffer"].clone()
    controller.end_epoch()
    assert controller.switched == 2
    assert controller.ranks == {"first": 3}
    assert type(model.second) is nn.Linear
    u, s, v = np.linalg.svd(before)
    np.testing.assert_allclose(product(model, "first"), u[:, :3] * s[:3] @ v[:3], atol=1e-6)
    assert model.first.bias is bias
    assert torch.equal(optimizer.state[bias]["momentum_buffer"], momentum)
    check_same_parameters(optimizer, model)
    run(model, optimizer, controller, 12, start=8)
    controller.end_epoch()  # once and for all
    assert controller.ranks == {"first": 3}
    assert type(controller.finish().first) is LowRankLinear


def spectrum(*values: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (12, 16)]
    (u, _), (v, _) = (torch.linalg.qr(m) for m in full)
    return v[:, : len(values)] @ torch.diag(torch.tensor(values).double()) @ u.T[: len(values)]


def test_cuttlefish_measures_and_switches_when_ranks_stand_still() -> None:
    model = Net(width=16)
    optimizer = sgd(model)
    model.first.weight = nn.Parameter(spectrum(*[1.0] * 12).float())  # stable rank 12
    optimizer = sgd(model)
    controller = Cuttlefish(
        model, optimizer, window=2, smooth=1, min_epochs=3, exclude_modules=["second"]
    )
    for epoch, values in enumerate([[2, 1, 1], [2, 2, 1], [2, 2, 1], [2, 2, 1]]):
        with torch.no_grad():
            model.first.weight.copy_(spectrum(*values))
        assert controller.switched is None, epoch
        controller.end_epoch()
    # sr: 12, 6/4, 9/4, 9/4, 9/4; of the last two changes the mean is 0 after the fourth epoch
    np.testing.assert_allclose(
        controller.stable_ranks["first"], [12, 1.5, 2.25, 2.25, 2.25], rtol=1e-5
    )
    assert controller.switched == 4
    assert controller.ranks == {"first": 3}  # ⌈12/12 · 2.25⌉


def test_cuttlefish_waits_for_its_epochs_but_not_for_ever() -> None:
    for options, expected in (
        ({"min_epochs": 4, "window": 1, "tolerance": 100.0}, 4),
        ({"min_epochs": 1, "max_epochs": 3, "tolerance": 1e-12, "window": 1}, 3),
        ({"min_epochs": 1, "tolerance": 1e-12, "window": 1}, None),
        ({"min_epochs": 1, "window": 5, "tolerance": 100.0}, 5),
    ):
        model = Net()
        optimizer = sgd(model)
        controller = Cuttlefish(model, optimizer, **options)
        for _ in range(6):
            run(model, optimizer, controller, 2)
            controller.end_epoch()
        assert controller.switched == expected, options


def test_the_estimate_and_the_movement() -> None:
    assert estimate((64, 32), [16.0, 8.0, 3.3]) == 7  # ⌈32/16 · 3.3⌉
    assert estimate((64, 32), [16.0, 20.0]) == 32
    assert estimate((64, 32), [16.0, 0.1]) == 1
    assert movement([1.0, 2.0], 1, 2) == float("inf")
    assert movement([5.0, 1.0, 2.0, 4.0], 1, 2) == pytest.approx((1 + 2) / 2)
    means = [4.0, 4 - 0.5 * 4, 2 - 0.5 * 2]  # of 4, 0, 0 with weight 2/(3 + 1)
    expected = np.mean([abs(b - a) for a, b in itertools.pairwise(means)])
    assert movement([4.0, 0.0, 0.0], 3, 2) == pytest.approx(expected)


def test_what_would_not_be_smaller_stays_dense() -> None:
    model = Net()
    controller = Pufferfish(model, sgd(model), epochs=1, share=0.9)
    controller.end_epoch()
    assert type(model.first) is type(model.second) is nn.Linear
    left = [event for event in controller.history if event["event"] == "left"]
    assert [event["site"] for event in left] == ["first", "second"]
    assert controller.switched == 1


@pytest.mark.parametrize("factored", [True, False])
def test_decay_is_that_of_the_product(factored: bool) -> None:
    """T14: autograd of λ/2 · ‖UV‖², of a dense weight λ/2 · ‖W‖²."""
    model = Net()
    if factored:
        model, _ = lowrank.factorize_by_design(model, 0.5)
        controller: Any = FrobeniusDecay(model, sgd(model), strength=0.3)
    else:
        controller = Cuttlefish(model, sgd(model), frobenius_decay=0.3)
    x, y = next(batches(1))
    loss = model(x, y)["loss"]
    names = ["first", "second"]
    dense = [m.dense_weight() if factored else m.weight for m in map(model.get_submodule, names)]
    loss.backward(retain_graph=True)
    controller.before_step()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (loss + 0.15 * sum(w.square().sum() for w in dense)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_decay_goes_on_after_the_switch() -> None:
    model = Net()
    optimizer = sgd(model)
    controller = Pufferfish(model, optimizer, epochs=1, frobenius_decay=0.5)
    controller.end_epoch()
    x, y = next(batches(1))
    model(x, y)["loss"].backward()
    up, down = model.first.up.weight, model.first.down.weight
    plain = up.grad.clone()
    controller.before_step()
    torch.testing.assert_close(up.grad, plain + 0.5 * (up @ down @ down.T).detach())


def test_decay_does_not_go_with_the_optimizers() -> None:
    model, _ = lowrank.factorize_by_design(Net(), 0.5)
    with pytest.raises(LowrankError, match=r"decays the weight of first .*weight_decay=0"):
        FrobeniusDecay(model, sgd(model, weight_decay=1e-4))
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    groups = [{"params": rest}, {"params": biases, "weight_decay": 0.1}]
    controller = FrobeniusDecay(model, torch.optim.SGD(groups, lr=0.1))  # no claim was left
    with pytest.raises(LowrankError, match="already has a controller"):
        FrobeniusDecay(model, torch.optim.SGD(groups, lr=0.1))
    assert controller.finish() is model
    dense = Net()
    with pytest.raises(LowrankError, match="decays the weight of first"):
        Pufferfish(dense, sgd(dense, weight_decay=1e-4), epochs=1, frobenius_decay=0.1)
    Pufferfish(dense, sgd(dense, weight_decay=1e-4), epochs=1)
    with pytest.raises(LowrankError, match="nothing to adapt"):
        FrobeniusDecay(Net(), sgd(Net()))


def test_spectral_start_and_decay_train_together() -> None:
    model, _ = lowrank.factorize_by_design(Net(), 0.5)
    optimizer = sgd(model)
    controller = FrobeniusDecay(model, optimizer, strength=1e-3)
    losses = run(model, optimizer, controller, 100)
    assert sum(losses[-8:]) < 0.3 * sum(losses[:8])


def test_inrank_grows_to_the_planted_rank() -> None:
    target = planted(40, 32, rank=6)
    model = one_layer(target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = InRank(model, optimizer, rank=2, buffer=4, share=0.99, warmup=20, every=10)
    assert controller.ranks == {"0": 6}
    assert controller.explained == {"0": 2}
    seen = []
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * (model[0].dense_weight() - target).square().sum()).backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        seen.append(controller.explained["0"])
        check_same_parameters(optimizer, model)
    assert all(a <= b for a, b in itertools.pairwise(seen))
    assert seen[:20] == [2] * 20
    assert controller.explained == {"0": 6}
    assert controller.ranks == {"0": 10}
    model = controller.finish()
    assert model[0].rank == 6
    np.testing.assert_allclose(product(model, "0"), target, atol=1e-3)
    check_same_parameters(optimizer, model)


def test_inrank_loses_nothing_as_it_grows_and_cuts_when_told() -> None:
    target = planted(40, 32, rank=12)
    model = one_layer(target)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    controller = InRank(model, optimizer, rank=1, buffer=2, share=0.9, warmup=1, every=1, steps=40)
    widths = []
    for step in range(42):
        optimizer.zero_grad()
        (0.5 * (model[0].dense_weight() - target).square().sum()).backward()
        controller.before_step()
        optimizer.step()
        before = product(model, "0")
        controller.after_step()
        if step + 1 < 40:
            np.testing.assert_allclose(product(model, "0"), before, atol=1e-12)
        widths.append(controller.ranks["0"])
    assert widths[0] == 3 < max(widths) <= 16
    assert controller.ranks == controller.explained
    assert widths[-1] == widths[39] < widths[38]


def test_explained_variance() -> None:
    values = torch.tensor([4.0, 2, 1, 0.1], dtype=torch.float64)

    def left(k: int) -> float:
        rest = np.array([0.0] * k + values.tolist()[k:])
        return 1 - rest.var() / values.numpy().var()

    for share in (0.3, 0.7, 0.9, 0.99):
        expected = next((k for k in range(1, 4) if left(k) > share), 4)
        assert explaining(values, share) == expected
    assert explaining(torch.ones(3), 0.5) == 3
