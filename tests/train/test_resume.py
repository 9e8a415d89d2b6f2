"""Stopped and resumed equals unbroken, bit for bit, on one thread."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowrank.train import DLRT, CondLR
from tests.train.loops import Net, run

CONTROLLERS: dict[str, Callable[..., Any]] = {
    "dlrt": lambda m, o: DLRT(m, o, tolerance=0.25, every=7),  # 100 is inside a cycle
    "budget": lambda m, o: DLRT(m, o, ratio=0.5, every=10, init="random"),  # and here at its start
    "condlr": lambda m, o: CondLR(m, o, tau=2.0, tolerance=0.2, every=25),
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
}


def made(controller: str, optimizer: str, seed: int = 0) -> tuple[Any, Any, Any]:
    model = Net(seed)
    live = OPTIMIZERS[optimizer](model.parameters())
    return model, live, CONTROLLERS[controller](model, live)


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CONTROLLERS)
def test_resumed_at_half_it_is_the_unbroken_run(name: str, optimizer: str) -> None:
    """T11, T12: ranks have changed by then; the model is rebuilt from other random numbers."""
    model, live, controller = made(name, optimizer)
    unbroken = run(model, live, controller, 200)

    model, live, controller = made(name, optimizer)
    first = run(model, live, controller, 100)
    file = io.BytesIO()
    torch.save([model.state_dict(), live.state_dict()], file)
    kept = json.dumps(controller.state_dict())  # it is JSON
    ranks = controller.ranks

    model, live, controller = made(name, optimizer, seed=5)
    controller.load_state_dict(json.loads(kept))
    file.seek(0)
    numbers, moments = torch.load(file, weights_only=True)
    model.load_state_dict(numbers)
    live.load_state_dict(moments)
    assert controller.ranks == ranks
    second = run(model, live, controller, 200, start=100)
    assert [*first, *second] == unbroken


def test_history_goes_on_where_it_stopped() -> None:
    model, live, controller = made("dlrt", "sgd")
    run(model, live, controller, 10)
    state = json.loads(json.dumps(controller.state_dict()))
    _, _, again = made("dlrt", "sgd", seed=5)
    again.load_state_dict(state)
    assert again.history == controller.history
    assert again.state_dict() == controller.state_dict()
