"""The common life calls a method's hooks in one order, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.train import (
    DLRT,
    GBLR,
    NM,
    STF,
    CondLR,
    Cuttlefish,
    FrobeniusDecay,
    InRank,
    LoQT,
    Maestro,
    Pufferfish,
    TuckerDLRT,
)  # fmt: skip
from lowrank.train.parts.base_controller import BaseController
from lowrank.types import Controller
from tests.train.loops import Net, batches
from tests.train.test_bad_input import sgd
from tests.train.test_plugs import Scaled

HOOKS = (
    "on_gradients", "on_overflow", "on_step", "on_skip", "on_epoch", "on_finish", "leave",
    "on_detach", "on_close", "check_state", "resize", "resume",
)  # fmt: skip


def recording(calls: list[str]) -> type[BaseController[nn.Linear]]:
    """A controller that notes its hooks, and that they run without autograd."""

    def recorder(hook: str) -> Callable[..., None]:
        def record(self: Any, *_: Any) -> None:
            assert not torch.is_grad_enabled()
            calls.append(hook)

        return record

    return type("Recorder", (BaseController,), {hook: recorder(hook) for hook in HOOKS})


def step(model: nn.Module, optimizer: Any, controller: Any, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    (model(*next(batches(1)))["loss"] * factor).backward()
    controller.before_step()
    optimizer.step()
    controller.after_step()


def test_hooks_run_in_order_without_autograd() -> None:
    calls: list[str] = []
    model = Net()
    optimizer = Scaled(sgd(model))
    controller = recording(calls)(model, optimizer)
    step(model, optimizer, controller)
    step(model, optimizer, controller, float("inf"))
    assert calls == ["on_gradients", "on_step", "on_overflow", "on_skip"]
    calls.clear()
    controller.load_state_dict(controller.state_dict())
    assert calls == ["check_state", "resize", "resize", "resume"]
    calls.clear()
    controller.end_epoch()
    assert controller.finish() is model
    assert calls == ["on_epoch", "on_finish", "leave", "leave", "on_close"]
    calls.clear()
    recording(calls)(model, optimizer).detach()
    assert calls == ["on_detach", "on_close"]


def test_a_step_that_was_skipped_does_not_stand_for_before_step() -> None:
    model = Net()
    optimizer = Scaled(sgd(model))
    controller = recording([])(model, optimizer)
    step(model, optimizer, controller, float("inf"))
    optimizer.step_was_skipped = False
    with pytest.raises(LowrankError, match=r"Recorder\.before_step was not called"):
        controller.after_step()


def test_what_check_sites_refuses_is_not_claimed() -> None:
    class Refusing(BaseController[nn.Linear]):
        def check_sites(self) -> None:
            raise LowrankError(f"{len(self.attachment.sites)} layers are too many")

    model = Net()
    with pytest.raises(LowrankError, match="2 layers are too many"):
        Refusing(model, sgd(model))
    assert set(BaseController(model, sgd(model)).layers) == {"first", "second"}


CONTROLLERS = (
    DLRT, GBLR, NM, STF, CondLR, Cuttlefish,
    FrobeniusDecay, InRank, LoQT, Maestro, Pufferfish, TuckerDLRT,
)  # fmt: skip


@pytest.mark.parametrize("controller", CONTROLLERS, ids=lambda cls: cls.__name__)
def test_every_controller_has_this_one_life(controller: type[Any]) -> None:
    """None overrides what a loop calls, and none is more than two classes away from the base."""
    ours = controller.__mro__[: controller.__mro__.index(BaseController)]
    assert len(ours) <= 2
    loop = [name for name in vars(Controller) if not name.startswith("_")]
    assert {"before_step", "after_step", "finish", "load_state_dict"} <= set(loop)
    assert [(cls, name) for cls in ours for name in loop if name in vars(cls)] == []
