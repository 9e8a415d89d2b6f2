"""One clear error, and a training state that is as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.nn import LowRankLinear
from lowrank.train import (
    DLRT,
    DSL,
    GBLR,
    NM,
    STF,
    Attachment,
    CondLR,
    Cuttlefish,
    InRank,
    LoQT,
    LowRankCallback,
    Maestro,
    Pufferfish,
)
from lowrank.train.parts import distributed
from lowrank.types import Controller
from tests.train.controllers import BY_STEPS, CONTROLLERS, EPOCH, EVERY, made, train
from tests.train.loops import Net, batches, run, same, sgd, snapshot

Make = Callable[..., Any]
BOTH = pytest.mark.parametrize("make", [DLRT, CondLR])
LOOKS = {"dlrt": 7, "dlrt, budget": 10}  # steps after which bases grow; LoQT gathers after 9
NM_10 = partial(NM, decay=10)
DSL_10 = partial(DSL, ratio=0.5, steps=10)
OUT_OF_RANGE: list[tuple[Make, dict[str, Any], str]] = [
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
    (GBLR, {"ratio": 1.0}, r"ratio must be in \(0, 1\), got 1.0"),
    (GBLR, {"ratio": 1e-3}, "ratio 0.001 cannot be reached"),
    (GBLR, {"start": 0.4}, r"start must be in \[ratio, 2\], got 0.4"),
    (GBLR, {"steps": 0}, "steps must be at least 1"),
    (GBLR, {"rate": float("nan")}, "rate is in fractions"),
    (GBLR, {"strength": 0.0}, "strength must be above 0"),
    (GBLR, {"sigma": 0.0}, r"sigma must be in \(0, 100\]"),
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
    (NM_10, {"decay": 0}, "need decay >= 1 and dense >= 0 steps, got 0 and 0"),
    (NM_10, {"dense": -1}, "need decay >= 1 and dense >= 0"),
    (NM_10, {"decay": 1.5}, "need decay >= 1"),
    (NM_10, {"pattern": (4, 4)}, r"pattern is \(N, M\) with 1 <= N < M"),
    (NM_10, {"pattern": (0, 4)}, "pattern is"),
    (NM_10, {"pattern": (2,)}, "pattern is"),
    (NM_10, {"pattern": (0.5, 4)}, "pattern is"),
    (NM_10, {"way": "exponent"}, "unknown way 'exponent'; did you mean 'exponential'"),
    (NM_10, {"rate": 0.0}, "rate > 0 belongs to"),
    (NM_10, {"rate": 0.1, "way": "stepwise"}, "> 0 belongs to 'linear' and 'exponential'"),
    (NM_10, {"strength": -1.0}, "strength must be at least 0"),
    (DSL_10, {"ratio": 1.0}, "ratio is the share kept, in"),
    (DSL_10, {"ratio": float("nan")}, "ratio is the share kept, in"),
    (DSL_10, {"ratio": 0.1}, "ratio 0.1 cannot be reached: .* keep 0.1591"),
    (DSL_10, {"steps": 0}, "steps must be an integer >= 1, got 0"),
    (DSL_10, {"every": 1.5}, "every must be an integer >= 1, got 1.5"),
    (DSL_10, {"share": 1.0}, r"share is of a layer's entries, in \(0, 1\), got 1.0"),
    (STF, {"ratio": 0.5, "rank": 3}, "ratio or rank, not both"),
    (STF, {"ratio": 1.0}, "ratio is the share kept, in"),
    (STF, {"ratio": float("nan")}, "ratio is the share kept, in"),
    (STF, {"ratio": 0.5, "density": 0.0}, "density is s / r, in"),
    (STF, {"ratio": 0.5, "density": 1.5}, "density is s / r, in"),
    (STF, {"rank": 0}, "rank must be an integer >= 1, got 0"),
    (STF, {"ratio": 0.5, "every": 0}, "every must be an integer >= 1"),
    (STF, {"ratio": 0.5, "freeze": 0}, "freeze must be an integer >= 1"),
    (STF, {"ratio": 0.5, "decay": -1.0}, "decay must be at least 0"),
    (STF, {"ratio": 0.5, "latent": "weights"}, "unknown latent 'weights'; did you mean 'weight'"),
    (STF, {}, r"nothing to adapt: first \(a dense layer: no ratio or rank"),
    (STF, {"ratio": 1e-3}, r"nothing to adapt: first \(a dense layer: no ratio or rank"),
    (STF, {"rank": 500}, r"nothing to adapt: first \(a dense layer: no ratio or rank"),
]


@pytest.mark.parametrize(("make", "options", "said"), OUT_OF_RANGE)
def test_an_option_out_of_range(make: Make, options: dict[str, Any], said: str) -> None:
    model = Net()
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    with pytest.raises(LowrankError, match=said):
        make(model, optimizer, **options)
    assert same(before, snapshot(model, optimizer))
    assert len(Attachment(model, optimizer, "any").sites) == 2  # and no claim is left


@EVERY
def test_nothing_to_adapt(name: str) -> None:
    make = CONTROLLERS[name]
    bare = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(LowrankError, match="has nothing to adapt: no known layer"):
        make(bare, sgd(bare))
    frozen = Net()
    frozen.first.weight.requires_grad_(False)
    frozen.second.bfloat16()
    optimizer = sgd(frozen)
    before = snapshot(frozen, optimizer)
    with pytest.raises(LowrankError, match=r"first \(its weight is frozen\), second .*bfloat16"):
        make(frozen, optimizer)
    assert same(before, snapshot(frozen, optimizer))
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
    broken = nn.Sequential(nn.Linear(12, 12))
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(LowrankError, match="its weight has numbers that are not finite"):
        make(broken, sgd(broken))


@EVERY
def test_attached_twice(name: str) -> None:
    model = Net()
    optimizer = sgd(model)
    first = CONTROLLERS[name](model, optimizer, target_modules=["first"])
    claimed = rf"first already has a controller \({type(first).__name__}"

    def refused(make: Make, **again: Any) -> None:
        before = snapshot(model, optimizer)
        with pytest.raises(LowrankError, match=claimed):
            make(model, optimizer, **again)
        assert same(before, snapshot(model, optimizer))

    for again in ({}, {"target_modules": ["first"]}, {"target_modules": "fir.*"}):
        refused(DLRT, **again)
    refused(Maestro)
    train(name, model, optimizer, first, 2 * EPOCH)
    refused(LoQT)
    second = DLRT(model, optimizer, target_modules=["second"])  # other layers are free
    optimizer.zero_grad()
    model(torch.randn(2, 12)).sum().backward()
    for controller in (first, second):
        controller.before_step()
    optimizer.step()
    for controller in (first, second):
        controller.after_step()
    if name in BY_STEPS:  # others train plain weights, or do so at first
        copied = copy.deepcopy(model)
        with pytest.raises(LowrankError, match="nothing to adapt"):  # of a copy nobody trains
            DLRT(copied, sgd(copied))
    first.finish()
    if type(model.first) in (nn.Linear, LowRankLinear):  # no claim: free for the next one
        assert set(Maestro(model, optimizer, target_modules=["first"]).ranks) == {"first"}
        return
    with pytest.raises(LowrankError, match=r"first \(it is a .*, which DLRT does not take"):
        DLRT(model, optimizer, target_modules=["first"])


@EVERY
def test_a_nan_gradient_harms_nothing(name: str) -> None:
    model, live, controller = made(name)
    train(name, model, live, controller, LOOKS.get(name, 9))
    before, state = snapshot(model, live), controller.state_dict()
    history = len(controller.history)
    x, y = next(batches(1))
    live.zero_grad()
    (model(x, y)["loss"] * float("nan")).backward()
    with pytest.raises(LowrankError, match=r"gradient at .*not finite.*skip this") as caught:
        controller.before_step()
    (where,) = re.findall(r"gradient at (first\.\S+)", str(caught.value))
    assert where in dict(model.named_parameters()) or name == "loqt"
    assert same(before, snapshot(model, live))
    assert controller.state_dict() == state
    assert len(controller.history) == history
    losses = train(name, model, live, controller, 30, start=9)  # and training goes on
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


@EVERY
def test_a_forgotten_before_step_is_noticed(name: str) -> None:
    _, _, controller = made(name)
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


@EVERY
def test_a_state_of_another_run_is_refused(name: str) -> None:
    model, live, controller = made(name)
    state = controller.state_dict()
    before = snapshot(model, live)
    with pytest.raises(LowrankError, match="saved by Other, it cannot go on with"):
        controller.load_state_dict({**state, "controller": "Other"})
    with pytest.raises(LowrankError, match="saved with other layers: second"):
        controller.load_state_dict({**state, "sites": {"first": state["sites"]["first"]}})
    assert same(before, snapshot(model, live))


def test_a_state_that_does_not_fit_the_model() -> None:
    _, _, controller = made("loqt")
    state = controller.state_dict()
    with pytest.raises(LowrankError, match="first has rank 4 in this state and 3 here"):
        controller.load_state_dict({**state, "sites": {"first": 4, "second": 3}})
    model, live, controller = made("pufferfish")
    state = controller.state_dict()
    train("pufferfish", model, live, controller, 7 * EPOCH)
    assert controller.switched == 7
    with pytest.raises(LowrankError, match="first is dense in this state and factored here"):
        controller.load_state_dict(state)


@EVERY
def test_controllers_keep_the_contract(name: str) -> None:
    model, _, controller = made(name)
    assert isinstance(controller, Controller)
    assert not isinstance(model, Controller)


def test_what_a_callback_cannot_take() -> None:
    with pytest.raises(LowrankError, match=r"expected a controller, or a function .* got int"):
        LowRankCallback(3)
    model = Net()
    controller = DLRT(model, sgd(model))
    with pytest.raises(LowrankError, match="built with another optimizer than the trainer's"):
        controller.rebind(sgd(model))
