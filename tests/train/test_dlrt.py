"""DLRT: nothing is lost in a change of basis, ranks are found, and the options do what they say."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank.linalg import retract
from lowrank.nn import LowRankLinear, USVLinear
from lowrank.train import DLRT
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import Net, batches, fit, one_layer, planted, run


def attached(tolerance: float | None = 0.1, *, lr: float = 0.3, **options: Any) -> tuple[Any, ...]:
    target = planted()
    model = one_layer(target)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    controller = DLRT(model, optimizer, tolerance=tolerance, **options)
    return model, optimizer, controller, target


@pytest.mark.parametrize("init", ["svd", "random"])
def test_a_planted_rank_is_found(init: Any) -> None:
    """T3: rank 4 from a start of 12, and the weight itself."""
    model, optimizer, controller, target = attached(every=2, rank=12, init=init)
    assert controller.ranks == {"0": 12}
    losses = fit(model, optimizer, controller, target, 120)
    assert controller.ranks == {"0": 4}
    assert losses[-1] < 1e-12
    model = controller.finish()
    assert type(model[0]) is LowRankLinear
    assert model[0].rank == 4
    np.testing.assert_allclose(model[0].dense_weight().detach(), target, atol=1e-6)


def test_adam_finds_it_too() -> None:
    target = planted()
    model = one_layer(target)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    controller = DLRT(model, optimizer, rank=12)
    for _ in range(300):
        fit(model, optimizer, controller, target, 1)
        schedule.step()
    assert controller.ranks == {"0": 4}
    assert fit(model, optimizer, controller, target, 1)[0] < 1e-3


def test_growing_the_bases_changes_nothing() -> None:
    """T1, in fp32 and through the controller; bases orthonormal to 1e-6."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = DLRT(model, optimizer, rank=5)
    before = model[0].dense_weight(torch.float64).detach()
    (model(torch.randn(30, 16)) - torch.randn(30, 20)).square().sum().backward()
    controller.before_step()
    layer = model[0]
    assert layer.s.shape == (10, 10)
    change = layer.dense_weight(torch.float64).detach() - before
    assert float(change.norm() / before.norm()) < 1e-6
    for factor in (layer.u, layer.v):
        gram = (factor.double().T @ factor.double()).detach()
        assert float((gram - torch.eye(10)).abs().max()) < 1e-6
    assert all(p.grad is None for n, p in layer.named_parameters() if not n.endswith("bias"))
    assert layer.bias.grad is not None


def test_a_truncation_loses_its_tail_and_no_more_than_the_tolerance() -> None:
    """T2, through the controller, whose Vᵀ must be a Vᵀ."""
    model, optimizer, controller, target = attached(0.2, every=3, rank=6, init="random")
    fit(model, optimizer, controller, target, 2)
    layer = model[0]
    before = layer.dense_weight().detach().numpy().copy()
    loss = 0.5 * (layer.weight - target).square().sum()
    loss.backward()
    controller.before_step()
    controller.after_step()  # the third step of the cycle, without moving anything
    after = model[0].dense_weight().detach().numpy()
    values = np.linalg.svd(before, compute_uv=False)
    rank = controller.ranks["0"]
    lost = np.linalg.norm(before - after)
    np.testing.assert_allclose(lost, np.linalg.norm(values[rank:]), atol=1e-12)
    assert lost <= 0.2 * np.linalg.norm(values)
    assert np.linalg.norm(values[rank - 1 :]) > 0.2 * np.linalg.norm(values)
    noted = controller.history[-1]
    assert noted["event"] == "truncate"
    assert noted["energy_lost"] == pytest.approx(lost**2 / (values**2).sum(), abs=1e-12)
    assert noted["condition"] == pytest.approx(values[0] / values[rank - 1])


def test_a_transposed_factor_of_the_svd_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """T16: with Vᵀ for V, as in the authors' code, bases stay orthonormal, the weight does not."""
    right = retract.core_svd

    def wrong(core: torch.Tensor) -> Any:
        p, values, q = right(core)
        return p, values, q.T

    monkeypatch.setattr(retract, "core_svd", wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_a_truncation_loses_its_tail_and_no_more_than_the_tolerance()


def test_at_full_rank_it_is_gradient_descent() -> None:
    """With θ = 0 and square factors of full rank, W follows W − η ∂L/∂W."""
    target = planted(6, 6, 6)
    model = one_layer(target)
    plain = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = DLRT(model, optimizer, tolerance=0.0, rank=6, every=3)
    for _ in range(10):
        fit(model, optimizer, controller, target, 1)
        plain -= 0.1 * (plain - target)
        torch.testing.assert_close(model[0].dense_weight().detach(), plain)


def test_the_loss_does_not_rise_but_for_what_a_truncation_cuts() -> None:
    model, optimizer, controller, target = attached(1e-3, every=4, rank=8, lr=0.2)
    losses = fit(model, optimizer, controller, target, 60)
    assert all(b <= a + 1e-4 * losses[0] for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adafactor"])
def test_the_optimizer_holds_exactly_the_live_parameters(name: str) -> None:
    """T10, after every step and after the end."""
    model = Net()
    extra = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **extra)
    controller = DLRT(model, optimizer, tolerance=0.5, every=3)
    shapes = set()

    def looked(step: int) -> None:
        check_same_parameters(optimizer, model)
        shapes.add(model.first.s.shape)
        for parameter, state in optimizer.state.items():
            for value in state.values():
                whole = isinstance(value, torch.Tensor) and value.ndim == 2 and name != "Adafactor"
                assert not whole or value.shape == parameter.shape

    run(model, optimizer, controller, 20, each=looked)
    assert len(shapes) > 2  # the ranks did change under it
    controller.finish()
    check_same_parameters(optimizer, model)
    loss = model(*next(batches(1)))["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert model(*next(batches(1)))["loss"] < loss


def test_momentum_survives_a_change_of_basis() -> None:
    """The step after a truncation is the step that the dense momentum would make."""
    target = planted(6, 6, 6)
    dense, factored = one_layer(target), one_layer(target)
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
    plain = torch.optim.SGD(dense.parameters(), **options)
    optimizer = torch.optim.SGD(factored.parameters(), **options)
    controller = DLRT(factored, optimizer, tolerance=0.0, rank=6, every=2)
    for _ in range(12):
        plain.zero_grad()
        (0.5 * (dense[0].weight - target).square().sum()).backward()
        plain.step()
        fit(factored, optimizer, controller, target, 1)
    torch.testing.assert_close(factored[0].dense_weight(), dense[0].weight)


def test_attached_in_the_middle_of_training_it_goes_on_with_the_momentum() -> None:
    target = planted(6, 6, 6)
    dense, factored = one_layer(target), one_layer(target)
    runs = []
    for model in (dense, factored):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            (0.5 * (model[0].weight - target).square().sum()).backward()
            optimizer.step()
        runs.append(optimizer)
    controller = DLRT(factored, runs[1], tolerance=0.0, rank=6, every=2)
    fit(factored, runs[1], controller, target, 1)
    runs[0].zero_grad()
    (0.5 * (dense[0].weight - target).square().sum()).backward()
    runs[0].step()
    torch.testing.assert_close(factored[0].dense_weight(), dense[0].weight)


def test_a_budget_is_kept() -> None:
    model = Net(width=40)
    whole = 12 * 40 + 40 * 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = DLRT(model, optimizer, ratio=0.4, min_rank=1, every=4)
    run(model, optimizer, controller, 12)
    controller.finish()
    kept = sum(m.cost().params for m in (model.first, model.second))
    assert kept <= 0.4 * whole
    ranks = (model.first.rank, model.second.rank)
    assert kept + 52 > 0.4 * whole or kept + 50 > 0.4 * whole, ranks  # one rank more is too much


def test_ranks_stay_within_their_limits() -> None:
    for least, most, tolerance in ((5, None, 0.9), (1, 3, 0.0), (4, 4, 0.5)):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        limits: dict[str, Any] = {"min_rank": least, "max_rank": most}
        controller = DLRT(model, optimizer, tolerance=tolerance, every=2, **limits)
        run(model, optimizer, controller, 6)
        want = least if most is None else most
        assert set(controller.ranks.values()) == {want}


@pytest.mark.parametrize(("rank", "want"), [(3, 3), (99, 10), (None, 5), (1.0, 10), (1e-9, 1)])
def test_the_start_is_what_was_asked(rank: Any, want: int) -> None:
    model = Net()
    dense = model.second.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = DLRT(model, optimizer, rank=rank, target_modules=["second"])
    assert controller.ranks == {"second": want}
    assert type(model.first) is nn.Linear
    values = np.linalg.svd(dense.numpy(), compute_uv=False)
    lost = float((model.second.dense_weight() - dense).detach().norm())
    assert lost == pytest.approx(np.linalg.norm(values[want:]), abs=1e-5)
    left = [line for line in controller.history if line["event"] == "left"]
    assert [(line["site"], line["reason"]) for line in left] == [("first", "not in target_modules")]


def test_a_random_start_is_seeded_and_as_large_as_the_weight() -> None:
    made = []
    for seed in (0, 0, 1):
        model = Net()
        norm = float(model.first.weight.detach().norm())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        DLRT(model, optimizer, init="random", seed=seed)
        assert float(model.first.s.detach().norm()) == pytest.approx(norm, rel=1e-5)
        made.append(model.first.dense_weight().detach())
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_what_is_not_smaller_becomes_dense_again() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    controller = DLRT(model, optimizer, tolerance=0.0, rank=1.0, every=2)
    run(model, optimizer, controller, 4)
    bias, output = model.first.bias, model(torch.ones(1, 12))
    model = controller.finish()
    assert type(model.first) is type(model.second) is nn.Linear
    assert model.first.bias is bias
    assert "exp_avg" in optimizer.state[bias]  # what stays keeps its state
    torch.testing.assert_close(model(torch.ones(1, 12)), output)
    assert {line["storage"] for line in controller.history if line["event"] == "finish"} == {
        "dense"
    }


def test_finished_models_are_saved_like_any_other(tmp_path: Any) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = DLRT(model, optimizer, tolerance=0.5, every=3)
    run(model, optimizer, controller, 7)  # in the middle of a cycle
    model = controller.finish()
    assert {type(m) for m in (model.first, model.second)} == {LowRankLinear}
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, Net(seed=1))
    x = torch.randn(3, 12)
    assert torch.equal(again(x), model(x))


def test_a_layer_that_was_not_used_keeps_its_bases() -> None:
    model = Net()
    model.unused = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = DLRT(model, optimizer, every=2, tolerance=0.0)
    before = model.unused.dense_weight().detach()
    run(model, optimizer, controller, 4)
    torch.testing.assert_close(model.unused.dense_weight().detach(), before)


def test_only_the_step_that_grows_pays_for_the_gradients_of_the_bases() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = DLRT(model, optimizer, every=4)
    wanted = [model.first.up.weight.requires_grad]
    run(
        model,
        optimizer,
        controller,
        8,
        each=lambda _: wanted.append(model.first.up.weight.requires_grad),
    )
    assert wanted == [True, False, False, False, True, False, False, False, True]


def test_an_epoch_ends_at_the_true_ranks() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = DLRT(model, optimizer, every=10, tolerance=0.3)
    run(model, optimizer, controller, 4)
    grown = controller.ranks
    controller.end_epoch()
    assert all(controller.ranks[name] < grown[name] for name in grown)
    known = len(controller.history)
    controller.end_epoch()  # nothing to cut
    assert len(controller.history) == known
    run(model, optimizer, controller, 1)


def test_a_detached_model_is_trained_on_by_its_optimizer_alone() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = DLRT(model, optimizer, every=4)
    run(model, optimizer, controller, 6)
    controller.detach()
    assert type(model.first) is USVLinear
    assert all(p.requires_grad for p in model.parameters())
    check_same_parameters(optimizer, model)
    controller.before_step()
    controller.after_step()


def test_a_weight_stored_the_other_way_round_is_trained_alike() -> None:
    """transformers' Conv1D holds (in, out): its momentum is turned, and its class comes back."""
    from transformers.pytorch_utils import Conv1D

    target = planted(6, 8, 3)
    model = nn.Sequential(Conv1D(6, 8).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        (0.5 * (model[0].weight.T - target).square().sum()).backward()
        optimizer.step()
    before = optimizer.state[model[0].weight]["momentum_buffer"].numpy().T.copy()  # (out, in)
    dense = model[0].weight.detach().numpy().T.copy()
    controller = DLRT(model, optimizer, tolerance=0.0, rank=6, every=2)
    u, v = (t.detach().numpy() for t in (model[0].u, model[0].v))
    np.testing.assert_allclose(model[0].dense_weight().detach(), dense, atol=1e-12)
    after = optimizer.state[model[0].core.weight]["momentum_buffer"]
    np.testing.assert_allclose(after, u.T @ before @ v, atol=1e-12)
    model = controller.finish()
    assert type(model[0]) is Conv1D
    np.testing.assert_allclose(model[0].weight.detach().numpy().T, dense, atol=1e-12)
