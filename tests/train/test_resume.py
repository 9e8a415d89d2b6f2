"""Stopped and resumed equals unbroken, bit for bit, on one thread."""

from __future__ import annotations

import copy
import io
import json
from itertools import product
from typing import Any

import pytest
import torch

import lowrank
from lowrank.train import FrobeniusDecay
from tests.train.controllers import BY_EPOCHS, BY_STEPS, EVERY, made, train
from tests.train.loops import Net, run, sgd

STEPS = 80
# In the middle of a cycle, of an epoch, of a decay; "dlrt, budget" at the start of a cycle.
STOP = dict.fromkeys(BY_STEPS | BY_EPOCHS, 52) | {"dlrt, budget": 50}
PAIRS = [
    *product(BY_STEPS, ("sgd, decay", "adam, decay", "adafactor")),
    *product(BY_EPOCHS, ("sgd", "adam", "smmf")),
]


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "optimizer"), PAIRS)
def test_resumed_it_is_the_unbroken_run(name: str, optimizer: str) -> None:
    """T11, T12: ranks of bases have changed by then; the model starts from other numbers."""
    model, live, controller = made(name, optimizer)
    unbroken = train(name, model, live, controller, STEPS)
    final = copy.deepcopy(model.state_dict())

    model, live, controller = made(name, optimizer)
    start = controller.ranks
    first = train(name, model, live, controller, STOP[name])
    file = io.BytesIO()
    torch.save([model.state_dict(), live.state_dict()], file)
    kept = json.dumps(controller.state_dict())  # it is JSON
    ranks = controller.ranks
    assert ranks != start or name not in BY_STEPS

    model, live, controller = made(name, optimizer, seed=5)
    controller.load_state_dict(json.loads(kept))
    file.seek(0)
    numbers, moments = torch.load(file, weights_only=True)
    model.load_state_dict(numbers)
    live.load_state_dict(moments)
    assert controller.ranks == ranks
    second = train(name, model, live, controller, STEPS, start=STOP[name])
    assert [*first, *second] == unbroken
    assert all(torch.equal(final[key], value) for key, value in model.state_dict().items())


@EVERY
def test_history_and_state_go_on_where_they_stopped(name: str) -> None:
    model, live, controller = made(name)
    train(name, model, live, controller, 10 if name in BY_STEPS else 70)
    state = json.loads(json.dumps(controller.state_dict()))
    _, _, again = made(name, seed=5)
    again.load_state_dict(state)
    assert again.history == controller.history
    assert again.state_dict() == controller.state_dict()


def test_decay_of_factors_resumes() -> None:
    def build(seed: int) -> tuple[Any, Any, Any]:
        model, _ = lowrank.factorize_by_design(Net(seed), 0.5)
        live = sgd(model)
        return model, live, FrobeniusDecay(model, live, strength=0.1)

    model, live, controller = build(0)
    unbroken = run(model, live, controller, 40)
    model, live, controller = build(0)
    first = run(model, live, controller, 20)
    again, second, other = build(1)
    other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    again.load_state_dict(model.state_dict())
    second.load_state_dict(live.state_dict())
    assert [*first, *run(again, second, other, 40, start=20)] == unbroken
