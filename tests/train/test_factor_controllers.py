"""What the controllers over plain factors, and LoQT, share: resuming, refusals, odd models."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.train import NM, STF, Cuttlefish, FrobeniusDecay, InRank, LoQT, Maestro, Pufferfish
from lowrank.types import Controller
from tests.train.loops import Net, batches, run
from tests.train.test_bad_input import same, sgd, snapshot

EPOCH = 8  # steps
CONTROLLERS: dict[str, Callable[..., Any]] = {
    "maestro": lambda m, o: Maestro(m, o, lasso=3e-3, threshold=0.05),
    "maestro, all cut": lambda m, o: Maestro(m, o, lasso=3e-3, threshold=0.05, cut="all", seed=3),
    "loqt": lambda m, o: LoQT(m, o, rank=3, gap=9, growth=1.3),
    "inrank": lambda m, o: InRank(m, o, rank=1, buffer=1, warmup=5, every=5, share=0.8, steps=75),
    "cuttlefish": lambda m, o: Cuttlefish(
        m, o, max_epochs=4, min_epochs=3, window=2, smooth=3, frobenius_decay=0.1
    ),
    "nm": lambda m, o: NM(m, o, decay=60, dense=10),
    "nm, stepwise": lambda m, o: NM(m, o, decay=60, pattern=(1, 4), way="stepwise"),
    "stf": lambda m, o: STF(m, o, ratio=0.7, decay=1e-3, freeze=73),
    "stf, weight": lambda m, o: STF(m, o, ratio=0.7, latent="weight", every=5),
    "pufferfish": lambda m, o: Pufferfish(m, o, epochs=7, frobenius_decay=1e-2),
}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "smmf": lambda p: lowrank.train.SMMF(p, lr=0.01),
}
EVERY = pytest.mark.parametrize("name", CONTROLLERS)


def made(controller: str, optimizer: str = "sgd", seed: int = 0) -> tuple[Any, Any, Any]:
    model = Net(seed)
    live = OPTIMIZERS[optimizer](model.parameters())
    return model, live, CONTROLLERS[controller](model, live)


def train(model: Any, live: Any, controller: Any, steps: int, start: int = 0) -> list[float]:
    def epoch(step: int) -> None:
        if (step + 1) % EPOCH == 0:
            controller.end_epoch()

    return run(model, live, controller, steps, start=start, each=epoch)


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@EVERY
def test_resumed_it_is_the_unbroken_run(name: str, optimizer: str) -> None:
    """T11, T12: bit for bit, in the middle of an epoch; the model is built from other numbers."""
    model, live, controller = made(name, optimizer)
    unbroken = train(model, live, controller, 100)
    final = copy.deepcopy(model.state_dict())

    model, live, controller = made(name, optimizer)
    first = train(model, live, controller, 52)
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
    second = train(model, live, controller, 100, start=52)
    assert [*first, *second] == unbroken
    assert all(torch.equal(final[key], value) for key, value in model.state_dict().items())


@EVERY
def test_history_and_state_go_on_where_they_stopped(name: str) -> None:
    model, live, controller = made(name)
    assert isinstance(controller, Controller)
    train(model, live, controller, 70)
    state = json.loads(json.dumps(controller.state_dict()))
    _, _, again = made(name, seed=5)
    again.load_state_dict(state)
    assert again.history == controller.history
    assert again.state_dict() == controller.state_dict()


@EVERY
def test_nothing_to_adapt(name: str) -> None:
    bare = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(LowrankError, match="has nothing to adapt: no known layer"):
        CONTROLLERS[name](bare, sgd(bare))
    frozen = Net()
    frozen.first.weight.requires_grad_(False)
    frozen.second.bfloat16()
    optimizer = sgd(frozen)
    before = snapshot(frozen, optimizer)
    with pytest.raises(LowrankError, match=r"first \(its weight is frozen\), second .*bfloat16"):
        CONTROLLERS[name](frozen, optimizer)
    assert same(before, snapshot(frozen, optimizer))


@EVERY
def test_attached_twice(name: str) -> None:
    model, live, controller = made(name)
    before = snapshot(model, live)
    who = type(controller).__name__
    with pytest.raises(LowrankError, match=rf"first already has a controller \({who}"):
        Maestro(model, live)
    assert same(before, snapshot(model, live))
    train(model, live, controller, 2 * EPOCH)
    with pytest.raises(LowrankError, match=rf"first already has a controller \({who}"):
        LoQT(model, live)
    controller.finish()
    plain = [n for n in ("first", "second") if type(model.get_submodule(n)) is nn.Linear]
    if plain:
        assert set(Maestro(model, live).ranks) == set(plain)


@EVERY
def test_a_nan_gradient_harms_nothing(name: str) -> None:
    model, live, controller = made(name)
    train(model, live, controller, 9)  # a step in which LoQT gathers a full gradient
    before = snapshot(model, live)
    state = controller.state_dict()
    x, y = next(batches(1))
    live.zero_grad()
    (model(x, y)["loss"] * float("nan")).backward()
    with pytest.raises(LowrankError, match=r"gradient at first\..* not finite.*skip this"):
        controller.before_step()
    assert same(before, snapshot(model, live))
    assert controller.state_dict() == state
    losses = train(model, live, controller, 30, start=9)  # and training goes on
    assert all(loss == loss for loss in losses)


@EVERY
def test_a_forgotten_before_step_is_noticed(name: str) -> None:
    _, _, controller = made(name)
    with pytest.raises(LowrankError, match="before_step was not called: call it after backward"):
        controller.after_step()


@EVERY
def test_a_state_of_another_run_is_refused(name: str) -> None:
    model, live, controller = made(name)
    state = controller.state_dict()
    before = snapshot(model, live)
    with pytest.raises(LowrankError, match="saved by Other, it cannot go on with"):
        controller.load_state_dict({**state, "controller": "Other"})
    with pytest.raises(LowrankError, match="saved with other layers: second"):
        controller.load_state_dict({**state, "sites": {"first": 6}})
    assert same(before, snapshot(model, live))


def test_a_state_that_does_not_fit_the_model() -> None:
    _, _, controller = made("loqt")
    state = controller.state_dict()
    with pytest.raises(LowrankError, match="first has rank 4 in this state and 3 here"):
        controller.load_state_dict({**state, "sites": {"first": 4, "second": 3}})
    model, live, controller = made("pufferfish")
    state = controller.state_dict()
    train(model, live, controller, 7 * EPOCH)
    assert controller.switched == 7
    with pytest.raises(LowrankError, match="first is dense in this state and factored here"):
        controller.load_state_dict(state)


@EVERY
def test_accelerate_accumulates(name: str) -> None:
    """Two halves of a batch, gradients synchronised at the second, are the whole batch."""
    from accelerate import Accelerator

    def trained(parts: int) -> dict[str, torch.Tensor]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model, optimizer = accelerator.prepare(model, optimizer)
        controller = CONTROLLERS[name](model, optimizer)
        for step, (x, y) in enumerate(batches(20)):
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                with accelerator.accumulate(model):
                    accelerator.backward(model(a, b)["loss"])
                    controller.before_step()
                    optimizer.step()
                    controller.after_step()
                    optimizer.zero_grad()
            if (step + 1) % EPOCH == 0:
                controller.end_epoch()
        assert controller.state_dict()["step"] == 20
        return dict(controller.finish().state_dict())

    whole, halves = trained(1), trained(2)
    assert whole.keys() == halves.keys()
    for key, value in whole.items():
        torch.testing.assert_close(halves[key], value, rtol=1e-3, atol=1e-4)


@EVERY
def test_a_module_of_two_names(name: str) -> None:
    """Both names lead to one layer before, meanwhile, and afterwards."""
    torch.manual_seed(0)
    shared = nn.Linear(12, 12)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    optimizer = sgd(model)
    controller = CONTROLLERS[name](model, optimizer)
    assert model[0] is model[2]
    for _ in range(EPOCH):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().mean().backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
    controller.end_epoch()
    model = controller.finish()
    assert model[0] is model[2]


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (Maestro, {"lasso": -1.0}, "lasso must be at least 0, got -1.0"),
        (Maestro, {"lasso": float("nan")}, "lasso must be at least 0"),
        (Maestro, {"threshold": 1.0}, "threshold is a share of importance"),
        (Maestro, {"min_rank": 0}, "1 <= min_rank <= rank, got 0"),
        (Maestro, {"min_rank": 3, "rank": 2}, "1 <= min_rank <= rank, got 3 and 2"),
        (Maestro, {"cut": "two"}, "unknown cut 'two'"),
        (Maestro, {"target_modules": ["third"]}, "'third' matches none of 2 layers"),
        (Cuttlefish, {"tolerance": 0.0}, "tolerance is a change of rank"),
        (Cuttlefish, {"window": 0}, "must be at least 1, got 0, 15 and 15"),
        (Cuttlefish, {"max_epochs": 3}, "min_epochs <= max_epochs, got 15 and 3"),
        (Cuttlefish, {"frobenius_decay": -1.0}, "decay must be at least 0"),
        (Pufferfish, {"epochs": 0}, "epochs of dense training must be at least 1"),
        (Pufferfish, {"epochs": 1, "share": 1.0}, "share of the full rank must be in"),
        (InRank, {"share": 1.0}, "share of explained variance must be in"),
        (InRank, {"buffer": 0}, "need rank, buffer, every >= 1"),
        (InRank, {"steps": 0}, "steps must be at least 1"),
    ],
)
def test_an_option_out_of_range(make: Any, options: dict[str, Any], said: str) -> None:
    model = Net()
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    with pytest.raises(LowrankError, match=said):
        make(model, optimizer, **options)
    assert same(before, snapshot(model, optimizer))


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
