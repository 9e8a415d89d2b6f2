"""Training loop of recovery, which keeps the state of lowest held-out loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from .optimizer import MUON, RecoveryOptimizer

Loss = Callable[[int], Tensor]
Pacing = Callable[[int, int], int]  # after each step: (step, steps) -> the number of steps
WARM = 0.1  # share of the steps used for warm-up


@dataclass(frozen=True)
class Training:
    """Hyperparameters of a training run.

    Attributes:
        steps: gradient steps, one batch each.
        rate: RMS of a step, relative to each parameter's RMS, so that one default fits models of
            any width; only `distill` takes None.
        checks: number of times that the held-out loss is evaluated.
        seed: random seed of the batch order.
        optimizer: see `RecoveryOptimizer`.
        vary: whether each step of distillation changes its batch, of images; see images.py.
    """

    steps: int = 120
    rate: float | None = None
    checks: int = 6
    seed: int = 0
    optimizer: str = MUON
    vary: bool = False


@dataclass(frozen=True)
class Trained:
    """Result of a training run: held-out loss before and after, the step of the best state, and
    the number of steps."""

    before: float
    after: float
    best_step: int
    steps: int

    @property
    def kept(self) -> bool:
        """Whether some step lowered the held-out loss; otherwise nothing was changed."""
        return self.best_step > 0


def fit(
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    batches: Sequence[int],
    held_out: Sequence[int],
    options: Training,
    *,
    pace: Pacing | None = None,
    known: float | None = None,
) -> Trained:
    """Minimise `loss` over the batches, and restore the state of lowest held-out loss.

    Args:
        loss: mean loss on the batch of this index.
        batches, held_out: indices of batches; the same if there is only one batch.
        pace: sets the number of steps while they are taken; by default it is that of the options.
        known: the held-out loss before, if it was computed already.

    Raises:
        LowrankError: the loss is NaN or Inf at the start.
    """
    parameters = [p for p in parameters if p.is_floating_point()]
    best = [p.detach().clone() for p in parameters]
    before = least = mean_of(loss, held_out) if known is None else known
    if not math.isfinite(before):
        raise LowrankError(
            "recovery cannot start: the loss of the compressed model is NaN or Inf; run it in "
            "float32 or bfloat16"
        )
    best_step = 0
    wanted = [p.requires_grad for p in parameters]
    assert options.rate is not None
    optimizer = RecoveryOptimizer(parameters, options.rate, options.optimizer)
    generator = torch.Generator().manual_seed(options.seed)
    order: list[int] = []
    step, steps = 0, options.steps
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        while step < steps:
            step += 1
            if not order:
                order = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(order.pop()), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            length = nn.utils.clip_grad_norm_(parameters, 1.0)
            if bool(torch.isfinite(length)):  # skip a step that overflowed in 16 bits
                optimizer.step(_schedule(step, steps))
            steps = steps if pace is None else pace(step, steps)
            if step % max(steps // max(options.checks, 1), 1) == 0 or step >= steps:
                now = mean_of(loss, held_out)
                if now < least:
                    least, best_step = now, step
                    best = [p.detach().clone() for p in parameters]
    finally:
        with torch.no_grad():
            for parameter, state, flag in zip(parameters, best, wanted, strict=True):
                parameter.copy_(state)
                parameter.grad = None
                parameter.requires_grad_(flag)
    return Trained(before, least, best_step, step)


def split(count: int, fitted: int | None = None, share: float = 0.1) -> tuple[list[int], list[int]]:
    """Indices of the batches to train on, and of the held-out ones, which are the last.

    Args:
        fitted: number to train on, if the rest was held out before; otherwise `share` decides.
    """
    kept = max(round(share * count), 1)
    if fitted is not None and 0 < fitted < count:
        kept = count - fitted
    every = list(range(count))
    return (every[:-kept], every[-kept:]) if count > 1 else (every, every)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then cosine decay to a tenth."""
    warm = max(WARM * steps, 1.0)
    if step < warm:
        return step / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1.0)))


@torch.no_grad()
def mean_of(loss: Loss, batches: Sequence[int]) -> float:
    return sum(float(loss(batch)) for batch in batches) / len(batches)
