"""A new controller is one class of some twenty lines, and has the whole life of the others."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.nn import LowRankLinear
from lowrank.train import Maestro
from lowrank.train.parts.base_controller import BaseController
from lowrank.train.parts.factor_controller import FactorController
from lowrank.train.parts.factors import shorten
from lowrank.train.parts.optimizer import check_same_parameters
from lowrank.types import Controller
from tests.train.loops import Net, batches, run
from tests.train.test_bad_input import same, sgd, snapshot
from tests.train.test_plugs import Scaled


class HalveAt(FactorController):
    """Factors of full rank, whose ranks are halved after so many steps."""

    def __init__(
        self, model: nn.Module, optimizer: Any, *, steps: int, target_modules: Any = "all-linear"
    ) -> None:
        if steps < 1:
            raise LowrankError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        super().__init__(model, optimizer, target_modules)
        self.factor({site.name: min(site.shape) for site in self.attachment.sites})

    def on_step(self) -> None:
        if self.attachment.step == self.steps:
            for name, layer in self.factored.items():
                shorten(self.attachment, layer, max(layer.rank // 2, 1))
                self.attachment.note("halve", name, rank=layer.rank)
            self.attachment.resized()


class NoisyGradients(BaseController[nn.Linear]):
    """Layers stay dense; their gradients get noise that fades with the steps."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        size: float,
        target_modules: Any = "all-linear",
    ) -> None:
        self.size, self._generator = size, torch.Generator().manual_seed(0)
        super().__init__(model, optimizer, target_modules)

    def on_gradients(self) -> None:
        scale = self.size * self.attachment.loss_scale() / (1 + self.attachment.step)
        for layer in self.layers.values():
            if layer.weight.grad is not None:
                noise = torch.randn(layer.weight.shape, generator=self._generator)
                layer.weight.grad.add_(noise, alpha=scale)

    def on_epoch(self) -> None:
        for name, layer in self.layers.items():
            self.attachment.note("noise", name, norm=float(layer.weight.norm()))

    def progress(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state().tolist()}

    def resume(self, state: dict[str, Any]) -> None:
        self._generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))


TOYS: dict[str, Callable[..., Any]] = {
    "HalveAt": lambda m, o, **options: HalveAt(m, o, steps=10, **options),
    "NoisyGradients": lambda m, o, **options: NoisyGradients(m, o, size=0.1, **options),
}
EVERY = pytest.mark.parametrize("name", TOYS)


def trained(name: str, steps: int, seed: int = 0) -> tuple[Any, Any, Any, list[float]]:
    """The plain loop with its three lines more."""
    model = Net(seed)
    optimizer = sgd(model)
    controller = TOYS[name](model, optimizer)
    losses = []
    for x, y in batches(steps):
        loss = model(x, labels=y)["loss"]
        loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, optimizer, controller, losses


@EVERY
def test_it_keeps_the_contract_and_trains(name: str) -> None:
    model, optimizer, controller, losses = trained(name, 40)
    assert isinstance(controller, Controller)
    assert controller.state_dict()["step"] == 40
    assert losses[-1] < losses[0]
    check_same_parameters(optimizer, model)


def test_ranks_and_history_say_what_happened() -> None:
    _, _, controller, _ = trained("HalveAt", 9)
    assert controller.ranks == {"first": 12, "second": 10}
    _, _, controller, _ = trained("HalveAt", 12)
    assert controller.ranks == {"first": 6, "second": 5}
    assert [line["event"] for line in controller.history] == ["factor"] * 2 + ["halve"] * 2
    assert controller.history[-1] == {"step": 10, "site": "second", "event": "halve", "rank": 5}
    _, _, controller, _ = trained("NoisyGradients", 3)
    controller.end_epoch()
    assert [(line["step"], line["event"]) for line in controller.history] == [(3, "noise")] * 2


@EVERY
def test_it_finishes_with_plain_modules_that_save_and_load(name: str, tmp_path: Path) -> None:
    model, optimizer, controller, _ = trained(name, 12)
    model = controller.finish()
    plain = LowRankLinear if name == "HalveAt" else nn.Linear
    assert type(model.first) is type(model.second) is plain
    check_same_parameters(optimizer, model)
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, Net(seed=1))
    x = torch.randn(3, 12)
    assert torch.equal(again(x), model(x))


@EVERY
@pytest.mark.parametrize("stop", [5, 15])
def test_resumed_it_is_the_unbroken_run(name: str, stop: int) -> None:
    *_, unbroken = trained(name, 30)
    model, optimizer, controller, first = trained(name, stop)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    state = json.loads(json.dumps(controller.state_dict()))
    file.seek(0)
    numbers, moments = torch.load(file, weights_only=True)

    model = Net(seed=5)
    optimizer = sgd(model)
    controller = TOYS[name](model, optimizer)
    controller.load_state_dict(state)
    assert controller.state_dict() == state
    model.load_state_dict(numbers)
    optimizer.load_state_dict(moments)
    assert [*first, *run(model, optimizer, controller, 30, start=stop)] == unbroken


@EVERY
def test_a_state_that_is_not_its_own_changes_nothing(name: str) -> None:
    model, optimizer, controller, _ = trained(name, 12)
    before, state = snapshot(model, optimizer), controller.state_dict()
    with pytest.raises(LowrankError, match=f"saved by Other, it cannot go on with {name}"):
        controller.load_state_dict({**state, "controller": "Other"})
    with pytest.raises(LowrankError, match="saved with other layers: second"):
        controller.load_state_dict({**state, "sites": {"first": 6}})
    assert same(before, snapshot(model, optimizer))
    assert controller.state_dict() == state


@EVERY
def test_detached_it_leaves_the_model_to_its_optimizer(name: str) -> None:
    model, optimizer, controller, _ = trained(name, 4)
    kinds = [type(module) for module in model.modules()]
    controller.detach()
    run(model, optimizer, controller, 20)  # the lines may stay in the loop
    assert [type(module) for module in model.modules()] == kinds
    check_same_parameters(optimizer, model)


@EVERY
def test_a_second_controller_on_the_same_layer_is_refused(name: str) -> None:
    model = Net()
    optimizer = sgd(model)
    controller = TOYS[name](model, optimizer, target_modules=["first"])
    before = snapshot(model, optimizer)
    for other in (*TOYS.values(), Maestro):
        with pytest.raises(LowrankError, match=rf"first already has a controller \({name}\)"):
            other(model, optimizer)
    assert same(before, snapshot(model, optimizer))
    Maestro(model, optimizer, target_modules=["second"])  # other layers are free
    controller.finish()


@EVERY
def test_a_skipped_step_is_no_step(name: str) -> None:
    losses = []
    for bad in (None, 0, 9):
        model = Net()
        optimizer = Scaled(sgd(model))
        controller = TOYS[name](model, optimizer)
        seen: list[float] = []
        for step in range(14):
            seen += run(model, optimizer, controller, step + 1, start=step)
            if step == bad:  # the next batch overflows: as if it had not been there
                x, y = next(batches(1))
                optimizer.zero_grad()
                (model(x, y)["loss"] * float("inf")).backward()
                controller.before_step()
                optimizer.step()
                controller.after_step()
        losses.append(seen)
        assert controller.state_dict()["step"] == 14
    assert losses[0] == losses[1] == losses[2]


@EVERY
def test_a_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    model, optimizer, controller, _ = trained(name, 4)
    before, state = snapshot(model, optimizer), controller.state_dict()
    x, y = next(batches(1))
    (model(x, y)["loss"] * float("nan")).backward()
    with pytest.raises(LowrankError, match=r"gradient at first\..* not finite"):
        controller.before_step()
    assert same(before, snapshot(model, optimizer))
    assert controller.state_dict() == state
    with pytest.raises(LowrankError, match=rf"{name}.before_step was not called"):
        controller.after_step()
