"""Foreign wrappers are read in one place, and what they hold is found."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import lowrank.train
from lowrank import LowrankError
from lowrank.train.parts import wrappers
from tests.train.loops import Net
from tests.train.test_bad_input import sgd
from tests.train.test_plugs import Scaled

ROOM = Path(lowrank.train.__file__).parent


def test_the_optimizer_is_found_inside_its_wrappers() -> None:
    optimizer = sgd(Net())
    wrapped = Scaled(optimizer)
    assert list(wrappers.nested(wrapped)) == [wrapped, optimizer]
    assert wrappers.inner_optimizer(wrapped) is optimizer
    with pytest.raises(LowrankError, match=r"expected a torch.optim.Optimizer.*got int"):
        wrappers.inner_optimizer(3)
    with pytest.raises(LowrankError, match="LBFGS keeps one state"):
        wrappers.inner_optimizer(torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]))


def test_plain_objects_need_no_wrapper() -> None:
    model = Net()
    optimizer = sgd(model)
    assert wrappers.synchronises(optimizer)
    assert not wrappers.skipped_step(optimizer)
    assert not wrappers.is_scaled(optimizer)
    assert wrappers.loss_scale(optimizer) == 1.0
    assert not wrappers.is_prepared(model)
    assert not wrappers.has_ddp(model)


def test_the_scale_of_the_loss_counts_until_gradients_are_unscaled() -> None:
    model = Net()
    wrapped = Scaled(sgd(model))
    scaler = GradScaler("cpu", init_scale=64.0)
    wrapped.scaler = scaler
    scaler.scale(model(torch.randn(2, 12)).sum()).backward()
    assert wrappers.loss_scale(wrapped) == 64.0
    scaler.unscale_(wrapped.optimizer)
    assert wrappers.loss_scale(wrapped) == 1.0


def test_no_other_file_guesses_attributes() -> None:
    """`getattr(x, "name", default)` is for objects that are not ours."""
    users = {
        path.relative_to(ROOM).as_posix()
        for path in ROOM.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
    }
    assert users == {"parts/wrappers.py"}
