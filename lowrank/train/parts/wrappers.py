"""What accelerate, DDP and gradient scalers put around a model and its optimizer.

These objects are not ours, and their attributes may be there or not: `getattr` with a default is
used here, and nowhere else in `lowrank.train`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import LowrankError
from ...walk.surgery import COMPILED


def nested(optimizer: Any) -> Iterator[Any]:
    """The optimizer as it was given, then what each wrapper holds."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer itself, out of accelerate's wrapper, which is a torch optimizer too.

    Raises:
        LowrankError: there is none, or one whose state is not per parameter (LBFGS).
    """
    for inner in nested(optimizer):
        accelerates = type(inner).__module__.startswith("accelerate")
        if isinstance(inner, torch.optim.LBFGS):
            raise LowrankError("LBFGS keeps one state for all parameters: its ranks cannot change")
        if isinstance(inner, torch.optim.Optimizer) and not accelerates:
            return inner
    got = type(optimizer).__name__
    raise LowrankError(f"expected a torch.optim.Optimizer, or accelerate's, got {got}")


def synchronises(optimizer: Any) -> bool:
    """Whether this batch ends in an optimizer step: false between accelerate's accumulated ones."""
    state = getattr(optimizer, "gradient_state", None)
    return state is None or bool(state.sync_gradients)


def skipped_step(optimizer: Any) -> bool:
    """Whether accelerate's scaler skipped the last step, because a gradient was not finite."""
    return bool(getattr(optimizer, "step_was_skipped", False))


def is_scaled(optimizer: Any) -> bool:
    """Whether accelerate's scaler watches the gradients: infinite ones are then no error."""
    return getattr(optimizer, "scaler", None) is not None


def loss_scale(optimizer: Any) -> float:
    """What the gradients are multiplied by now: a scaler's factor until they are unscaled."""
    scaler: Any = getattr(optimizer, "scaler", None)
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is None or not scaler.is_enabled():
        return 1.0
    stage = states[id(inner_optimizer(optimizer))]["stage"]
    return float(scaler.get_scale()) if stage.name == "READY" else 1.0


def is_prepared(root: nn.Module) -> bool:
    """Whether the model went through `accelerate.prepare`."""
    return bool(getattr(root, "_is_accelerate_prepared", False))


def has_ddp(model: nn.Module) -> bool:
    """Whether DDP is around the model, perhaps inside torch.compile's wrapper."""
    while not isinstance(model, DistributedDataParallel):
        inner = model._modules.get(COMPILED)
        if inner is None:
            return False
        model = inner
    return True
