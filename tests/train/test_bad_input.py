"""One clear error, and a training state that is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.train import DLRT, Attachment, CondLR, LowRankCallback
from lowrank.train.parts import distributed
from lowrank.types import Controller
from tests.train.loops import Net, batches, run

Make = Callable[..., Any]
BOTH = pytest.mark.parametrize("make", [DLRT, CondLR])


def snapshot(model: nn.Module, optimizer: Any) -> tuple[Any, ...]:
    return (
        [id(p) for g in optimizer.param_groups for p in g["params"]],
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        [(name, type(module)) for name, module in model.named_modules()],
    )


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    equal = all(torch.equal(a[1][key], b[1][key]) for key in a[1].keys() | b[1].keys())
    return a[0] == b[0] and equal and str(a[2]) == str(b[2]) and a[3] == b[3]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (DLRT, {"tolerance": 1.0}, "tolerance must be in .*got 1.0.*truncates everything"),
        (DLRT, {"tolerance": -0.1}, "tolerance must be in"),
        (DLRT, {"tolerance": float("nan")}, "tolerance must be in"),
        (DLRT, {"ratio": 1.5}, "ratio is the share kept"),
        (DLRT, {"ratio": 0.01}, "ratio 0.01 cannot be reached.*keep 0.3068"),
        (DLRT, {"every": 1}, "every must be at least 2, got 1"),
        (DLRT, {"min_rank": 0}, "1 <= min_rank <= max_rank, got 0"),
        (DLRT, {"min_rank": 3, "max_rank": 2}, "1 <= min_rank <= max_rank, got 3 and 2"),
        (DLRT, {"rank": 0}, "rank must be an int >= 1 or a share"),
        (DLRT, {"rank": 1.5}, "rank must be an int >= 1 or a share"),
        (DLRT, {"rank": True}, "rank must be an int >= 1 or a share"),
        (DLRT, {"init": "zeros"}, "init must be 'svd' or 'random', got 'zeros'"),
        (DLRT, {"target_modules": ["third"]}, "'third' matches none of 2 layers"),
        (CondLR, {"tau": 0.9}, "tau bounds a condition number and must be >= 1, got 0.9"),
        (CondLR, {"tau": float("nan")}, "tau bounds a condition number"),
        (CondLR, {"tolerance": 1.0}, "tolerance must be in"),
        (CondLR, {"every": 0}, "every must be at least 1"),
        (CondLR, {"scaling": "bounds"}, "unknown scaling 'bounds'; did you mean 'bound'"),
    ],
)
def test_an_option_out_of_range(make: Make, options: dict[str, Any], said: str) -> None:
    model = Net()
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    with pytest.raises(LowrankError, match=said):
        make(model, optimizer, **options)
    assert same(before, snapshot(model, optimizer))


@BOTH
def test_nothing_to_adapt(make: Make) -> None:
    bare = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(LowrankError, match="has nothing to adapt: no known layer"):
        make(bare, sgd(bare))
    frozen = Net()
    frozen.first.weight.requires_grad_(False)
    frozen.second.bfloat16()
    optimizer = sgd(frozen)
    with pytest.raises(LowrankError, match=r"first \(its weight is frozen\), second .*bfloat16"):
        make(frozen, optimizer)
    alone = nn.Linear(4, 4)
    with pytest.raises(LowrankError, match=r"put it into an nn.Sequential"):
        make(alone, sgd(alone))
    tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tied[1].weight, tied[1].bias = tied[0].weight, tied[0].bias
    with pytest.raises(LowrankError, match="its weight is tied to 1"):
        make(tied, sgd(tied))
    other = Net()
    with pytest.raises(LowrankError, match="its weight is not in the optimizer"):
        make(other, sgd(Net()))
    broken = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(LowrankError, match="its weight has numbers that are not finite"):
        make(broken, sgd(broken))


@BOTH
def test_attached_twice(make: Make) -> None:
    model = Net()
    optimizer = sgd(model)
    first = make(model, optimizer, target_modules=["first"])
    before = snapshot(model, optimizer)
    for again in ({}, {"target_modules": ["first"]}, {"target_modules": "fir.*"}):
        with pytest.raises(
            LowrankError, match=rf"first already has a controller \({make.__name__}"
        ):
            DLRT(model, optimizer, **again)
    assert same(before, snapshot(model, optimizer))
    second = DLRT(model, optimizer, target_modules=["second"])  # other layers are free
    model(torch.randn(2, 12)).sum().backward()
    for controller in (first, second):
        controller.before_step()
    optimizer.step()
    for controller in (first, second):
        controller.after_step()
    copied = copy.deepcopy(model)
    with pytest.raises(LowrankError, match="nothing to adapt"):  # of a copy nobody trains
        DLRT(copied, sgd(copied))
    first.finish()
    with pytest.raises(LowrankError, match="matches none of 0 layers"):
        DLRT(model, optimizer, target_modules=["first"])  # no claim, but factored by now


@BOTH
def test_a_nan_gradient_harms_nothing(make: Make) -> None:
    model = Net()
    optimizer = sgd(model)
    controller = make(model, optimizer)
    run(model, optimizer, controller, 10)
    before = snapshot(model, optimizer)
    history = len(controller.history)
    x, y = next(batches(1))
    optimizer.zero_grad()
    (model(x, y)["loss"] * float("nan")).backward()
    with pytest.raises(LowrankError, match=r"gradient at first.up.weight .*not finite.*skip this"):
        controller.before_step()
    assert same(before, snapshot(model, optimizer))
    assert len(controller.history) == history
    losses = run(model, optimizer, controller, 20, start=10)  # and training goes on
    assert all(loss == loss for loss in losses)


@BOTH
def test_a_weight_that_diverged_is_named(make: Make) -> None:
    model = Net()
    optimizer = sgd(model)
    controller = make(model, optimizer)
    run(model, optimizer, controller, 9)
    with torch.no_grad():
        model.first.core.weight[0, 0] = float("inf")
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    controller.before_step()
    with pytest.raises(LowrankError, match=r"the weight at first.core.weight"):
        controller.after_step()
    assert same(before, snapshot(model, optimizer))


@BOTH
def test_a_forgotten_before_step_is_noticed(make: Make) -> None:
    model = Net()
    optimizer = sgd(model)
    controller = make(model, optimizer)
    with pytest.raises(LowrankError, match="before_step was not called: call it after backward"):
        controller.after_step()


@BOTH
def test_attached_before_prepare(make: Make) -> None:
    from accelerate import Accelerator

    model = Net()
    optimizer = sgd(model)
    controller = make(model, optimizer)
    accelerator = Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(model, optimizer)
    x, y = next(batches(1))
    accelerator.backward(model(x, y)["loss"])
    before = snapshot(model, wrapped)
    with pytest.raises(LowrankError, match=r"built before accelerate.prepare"):
        controller.before_step()
    assert same(before, snapshot(model, wrapped))


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"])
@BOTH
def test_sharded_models_are_refused(make: Make, name: str) -> None:
    model = Net()
    optimizer = sgd(model)
    model.__class__ = type(name, (Net,), {})
    with pytest.raises(LowrankError, match=f"cannot change ranks under {name}"):
        make(model, optimizer)
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize("name", ["ZeroRedundancyOptimizer", "DeepSpeedZeroOptimizer_Stage3"])
def test_sharded_optimizers_are_refused(name: str) -> None:
    model = Net()
    optimizer = type(name, (torch.optim.SGD,), {})(model.parameters(), lr=0.1)
    with pytest.raises(LowrankError, match=f"under {name}: FSDP and ZeRO hold slices"):
        DLRT(model, optimizer)


def test_several_processes_need_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    model = Net()
    with pytest.raises(LowrankError, match="before the model was wrapped for 2 processes"):
        DLRT(model, sgd(model))
    with pytest.raises(LowrankError, match="must be wrapped in DDP"):
        distributed.wrapper_of(model)


@BOTH
def test_a_state_of_another_run_is_refused(make: Make) -> None:
    model = Net()
    optimizer = sgd(model)
    controller = make(model, optimizer)
    state = controller.state_dict()
    before = snapshot(model, optimizer)
    with pytest.raises(LowrankError, match="saved by Other, it cannot go on with"):
        controller.load_state_dict({**state, "controller": "Other"})
    with pytest.raises(LowrankError, match="saved with other layers: second"):
        controller.load_state_dict({**state, "sites": {"first": [6, 6]}})
    assert same(before, snapshot(model, optimizer))


@BOTH
def test_controllers_keep_the_contract(make: Make) -> None:
    model = Net()
    assert isinstance(make(model, sgd(model)), Controller)
    assert not isinstance(model, Controller)


def test_what_a_callback_cannot_take() -> None:
    with pytest.raises(LowrankError, match=r"expected a controller, or a function .* got int"):
        LowRankCallback(3)
    model = Net()
    controller = DLRT(model, sgd(model))
    with pytest.raises(LowrankError, match="built with another optimizer than the trainer's"):
        controller.rebind(sgd(model))


def test_what_was_refused_can_be_adapted_later() -> None:
    model = Net()
    optimizer = sgd(model)
    with pytest.raises(LowrankError):
        DLRT(model, optimizer, ratio=0.001)
    assert len(Attachment(model, optimizer, "any").sites) == 2
    DLRT(model, optimizer)
