"""N:M by decaying gradients: what counts, what is trained, and what is left at the end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.linalg.nm import nm_mask
from lowrank.nn import LowRankLinear, LowRankSparseLinear
from lowrank.train import NM
from lowrank.train.nm import frames, phase
from lowrank.train.parts.optimizer import check_same_parameters
from tests.train.loops import Net, batches, data, run, sgd
from tests.train.test_plugs import Scaled

WAYS = ["linear", "exponential", "stepwise", "geometric", "densify", "sr-ste"]


def test_beta_falls_to_a_hundredth_at_the_end_of_the_decay() -> None:
    """Not by the authors' fixed 0.01 a step."""
    for way in ("linear", "exponential"):
        for decay in (10, 1000):
            shares = [phase(way, (2, 4), step, decay)[1] for step in range(-3, decay + 3)]
            assert shares[:4] == [1.0] * 4  # dense, and the first step of the decay
            assert shares == sorted(shares, reverse=True)
            assert shares[decay + 3 :] == [0.0] * 3
    assert phase("linear", (2, 4), 50, 100)[1] == pytest.approx(1 - 0.5 * 0.99)
    assert phase("exponential", (2, 4), 50, 100)[1] == pytest.approx(0.1)
    assert phase("exponential", (2, 4), 999, 1000)[1] == pytest.approx(0.01, rel=0.01)
    assert phase("linear", (2, 4), 3, 100, rate=0.1)[1] == pytest.approx(0.7)
    assert phase("linear", (2, 4), 30, 100, rate=0.1)[1] == 0


@pytest.mark.parametrize(
    ("way", "pattern", "want"),
    [
        ("stepwise", (1, 16), [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]),
        ("stepwise", (2, 4), [(3, 4), (2, 4)]),
        ("stepwise", (1, 4), [(3, 4), (2, 4), (1, 4)]),
        ("stepwise", (3, 8), [(7, 8), (4, 8), (3, 8)]),
        ("stepwise", (1, 2), [(1, 2)]),
        ("geometric", (2, 4), [(16, 32), (8, 16), (4, 8), (2, 4)]),
        ("densify", (2, 4), [(2, 32), (2, 16), (2, 8), (2, 4)]),
    ],
)
def test_the_patterns_of_structure_decay(way: str, pattern: Any, want: list[Any]) -> None:
    assert frames(way, pattern) == want
    length = 3 * len(want)
    seen = [phase(way, pattern, step, length) for step in range(length)]
    assert seen == [(each, 0.0) for each in want for _ in range(3)]  # equal frames
    assert phase(way, pattern, length, length) == (pattern, 0.0)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_go_straight_through_to_what_is_trained(way: Any) -> None:
    """Against a loop in plain autograd: ŵ = w (m + (1 − m) β) forward, dw = dŵ; three phases."""
    model = Net().double()
    twin = copy.deepcopy(model)
    lr, strength = 0.05, 0.3
    options = {"strength": strength} if way == "sr-ste" else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    controller = NM(model, optimizer, decay=6, dense=3, pattern=(1, 4), way=way, **options)
    trained = {n: p.detach().clone() for n, p in twin.named_parameters()}
    for step, (x, y) in enumerate(batches(14)):
        pattern, share = phase(way, (1, 4), step - 3, 6)
        masks = {n: nm_mask(w, *pattern) for n, w in trained.items() if w.ndim == 2}
        counts = {
            n: w * torch.where(masks[n], 1.0, share) if n in masks else w
            for n, w in trained.items()
        }
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), counts[name])
        used = {n: w.clone().requires_grad_() for n, w in counts.items()}
        loss = (torch.func.functional_call(twin, used, (x.double(),)) - y).square().mean()
        found = dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))
        for name, weight in trained.items():
            pull = found[name]
            if way == "sr-ste" and name in masks and step >= 3:
                pull = pull + strength * weight * ~masks[name]
            trained[name] = weight - lr * pull
        optimizer.zero_grad()
        (model(x.double()) - y).square().mean().backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
    for layer in (model.first, model.second):
        groups = (layer.weight.detach() != 0).unfold(1, 4, 4)
        assert groups.sum(-1).unique().tolist() == [1]


def test_before_the_decay_it_is_plain_training() -> None:
    def losses(controlled: bool) -> list[float]:
        model = Net()
        optimizer = sgd(model)

        class Nothing:
            def before_step(self) -> None: ...

            def after_step(self) -> None: ...

        controller = NM(model, optimizer, decay=5, dense=20) if controlled else Nothing()
        return run(model, optimizer, controller, 20)

    assert losses(True) == losses(False)


def test_what_was_pruned_comes_back_when_it_grows() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    controller = NM(model, optimizer, decay=1, pattern=(2, 4), way="stepwise")
    assert model[0].weight.tolist() == [[4, 3, 2, 0]]  # 3:4 comes first
    model(torch.tensor([0.0, 0.0, 0.0, -9.0])).sum().backward()
    controller.before_step()
    optimizer.step()
    controller.after_step()
    assert model[0].weight.tolist() == [[4, 0, 0, 10]]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [0, 3, 30])
def test_finished_the_layers_are_plain_and_sparse(way: Any, steps: int, tmp_path: Path) -> None:
    """Also when it ends early."""
    model = Net()
    live = torch.optim.AdamW(model.parameters(), lr=0.01)
    names = list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    controller = NM(model, live, decay=10, dense=5, pattern=(2, 4), way=way)
    run(model, live, controller, steps, each=lambda _: check_same_parameters(live, model))
    assert controller.finish() is model
    check_same_parameters(live, model)
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == parameters
    for layer in (model.first, model.second):
        assert type(layer) is nn.Linear
        assert (layer.weight != 0).unfold(1, 4, 4).sum(-1).unique().tolist() == [2]
    last = {h["site"]: h for h in controller.history if h["event"] == "finish"}
    assert (last["first"]["kept"], last["first"]["of"]) == (96, 192)
    assert last["first"]["bytes"] == 96 * 4 + 96 * 2 // 8
    NM(model, live, decay=10)  # no claim is left


@pytest.mark.parametrize("kind", ["low rank", "with columns"])
def test_a_factor_is_a_weight_too(kind: str, tmp_path: Path) -> None:
    model: Any = Net()
    layer = LowRankLinear(12, 16, 8) if kind == "low rank" else LowRankSparseLinear(12, 16, 8, 4)
    model.first = layer
    live = sgd(model)
    controller = NM(model, live, decay=10, target_modules=["first"])
    run(model, live, controller, 15)
    assert controller.ranks == ({"first": 8} if kind == "low rank" else {})
    model = controller.finish()
    assert type(model.first) is type(layer)
    both = [model.first.down.weight, model.first.up.weight]
    both += [model.first.sparse.weight] if kind != "low rank" else []
    for weight in both:
        assert (weight != 0).unfold(1, 4, 4).sum(-1).max() == 2
    assert bool((model.second.weight != 0).all())
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, Net(seed=3))
    x, _ = data()
    assert torch.equal(again(x), model(x))


def test_groups_run_along_the_inputs_of_every_layout() -> None:
    from tests.zoo import make

    net = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv1d(8, 4, 3, groups=2))
    live = torch.optim.SGD(net.parameters(), lr=0.1)
    NM(net, live, decay=1, way="stepwise", target_modules=["0"]).finish()
    kept = (net[0].weight != 0).movedim(1, -1)  # (O, kh, kw, I)
    assert kept.unfold(-1, 4, 4).sum(-1).unique().tolist() == [2]
    gpt = make("gpt2")
    weight = gpt.transformer.h[0].mlp.c_fc.weight  # (in, out)
    before = weight.detach().clone()
    NM(gpt, sgd(gpt), decay=1, way="stepwise", target_modules=["c_fc"]).finish()
    want = before.T * nm_mask(before.T, 2, 4)
    assert torch.equal(weight.detach().T, want)


class Overflow(Scaled):
    """Skips the steps it is told to, though these gradients are finite: others were not."""

    skip = False

    def step(self) -> None:
        self.step_was_skipped = self.skip
        if not self.skip:
            self.optimizer.step()


def test_a_step_skipped_for_another_layers_sake_changes_nothing() -> None:
    def trained(skipped: bool) -> dict[str, Tensor]:
        model = Net()
        optimizer = Overflow(sgd(model))
        controller = NM(model, optimizer, decay=6)
        for step, (x, y) in enumerate(batches(10)):
            for skip in (True, False) if skipped and step in (0, 4, 8) else (False,):
                before = copy.deepcopy(model.state_dict())
                optimizer.skip = skip
                optimizer.zero_grad()
                model(x, y)["loss"].backward()
                controller.before_step()
                optimizer.step()
                controller.after_step()
                after = model.state_dict()
                assert all(torch.equal(before[n], after[n]) for n in before) == skip
        return model.state_dict()

    a, b = trained(True), trained(False)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_detached_it_leaves_what_counts() -> None:
    model = Net()
    live = sgd(model)
    controller = NM(model, live, decay=100)
    run(model, live, controller, 10)
    x, _ = data()
    before, names = model(x).detach(), set(Net().state_dict())
    controller.detach()
    assert set(model.state_dict()) == names
    assert torch.equal(model(x), before)
    assert bool((model.first.weight != 0).all())


def test_history_names_the_patterns() -> None:
    model = Net()
    live = sgd(model)
    controller = NM(model, live, decay=9, dense=2, pattern=(1, 4), way="stepwise")
    run(model, live, controller, 12)
    lines = [h for h in controller.history if h["event"] == "pattern" and h["site"] == "first"]
    assert [(h["step"], h["n"], h["m"]) for h in lines] == [(2, 3, 4), (5, 2, 4), (8, 1, 4)]
