"""Batch norm after compression: mean and variance of what it reads now, where that helps.

A layer that lost something gives outputs of another mean and a smaller variance, and the norm that
follows still removes those of the dense layer. Both can be gathered anew (Jung et al., arXiv
1712.01048, and many after). On few images, without the augmentation of training, such estimates are
off for the dense model already; so the running numbers move by what differs between the compressed
and the dense model on the same images, which leaves a dense model as it is.
Where layers were fitted to the dense outputs it may still do harm: it is kept only if held-out rows
say that it helps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch, Data, materialise
from ..calibration.running import forward, quiet
from ..errors import LowrankError
from ..measure.eval import Reference
from ..walk.layouts import keeps_moments
from .training import split

State = dict[str, tuple[Tensor, Tensor]]


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Those that keep a running mean and variance, by name."""
    return {name: part for name, part in model.named_modules() if keeps_moments(part)}


def bn_recalibrate(
    model: nn.Module,
    data: Data,
    *,
    reference: nn.Module,
    held_out: Sequence[Batch] | None = None,
) -> bool:
    """Re-estimate running means and variances of a compressed model, where held-out rows gain.

    Means and variances move by what differs from those that the dense model gives on the same data:
    exactly so where a layer's outputs were scaled and shifted.

    Args:
        model: changed only if its mean KL from `reference` on the held-out rows becomes smaller.
        data: as for `compress`, but no callable: what is estimated from.
        reference: the dense model, with norms of the same names.
        held_out: batches to judge by; None takes the last tenth of those of `data`.

    Returns:
        Whether they were kept.

    Raises:
        LowrankError: the data is a callable, or the models have no batch norm in common.
    """
    batches = materialise(data)
    if callable(batches):
        raise LowrankError("bn_recalibrate runs the model on batches: pass data that holds them")
    norms = batch_norms(model)
    if not norms.keys() & batch_norms(reference).keys():
        raise LowrankError("the two models have no batch norm with running numbers in common")
    held = list(held_out or ())
    if not held:
        fitted, kept = split(len(batches))
        batches, held = [batches[i] for i in fitted], [batches[i] for i in kept]
    judge = Reference(reference, held)
    before = judge.judged(model)
    old = {name: _state(part) for name, part in norms.items()}
    set_moments(model, moved(reference, gathered(model, batches), gathered(reference, batches)))
    if judge.judged(model) < before:
        return True
    set_moments(model, old)
    return False


def gathered(model: nn.Module, batches: Sequence[Batch]) -> State:
    """Mean and variance (channels,) of what each batch norm reads, pooled over all batches.

    Norms use those of the batch at hand meanwhile; a norm that reads one value a channel in some
    batch, or is not called, keeps its own. The model is not changed.
    """
    sums: dict[str, Sequence[Tensor]] = {}

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].detach().double().movedim(1, -1).flatten(0, -2)
            moments = (rows.new_tensor(float(len(rows))), rows.sum(0), rows.square().sum(0))
            before = sums.get(name)
            sums[name] = (
                moments if before is None else [a + b for a, b in zip(before, moments, strict=True)]
            )

        return hook

    norms = batch_norms(model)
    with quiet(model), _by_batch(norms.values()):
        handles = [part.register_forward_pre_hook(hook_of(name)) for name, part in norms.items()]
        try:
            for batch in batches:
                forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    state: State = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        state[name] = mean, (squares / count - mean.square()).clamp(min=0) * count / (count - 1)
    return state


@contextmanager
def _by_batch(norms: Iterable[Any]) -> Iterator[None]:
    """Normalise by the batch, and leave running numbers as they are."""
    held = [(part, part.track_running_stats, part.running_mean, part.running_var) for part in norms]
    try:
        for part, *_ in held:
            part.training = True
            part.track_running_stats = False
            part.running_mean = part.running_var = None
        yield
    finally:
        for part, track, mean, var in held:
            part.training = False
            part.track_running_stats, part.running_mean, part.running_var = track, mean, var


def moved(reference: nn.Module, now: State, was: State) -> State:
    """The running numbers of the dense model, by as much as the data shows others.

    Args:
        now, was: what `gathered` gives of the compressed and of the dense model.
    """
    state, dense = State(), batch_norms(reference)
    for name in now.keys() & was.keys() & dense.keys():
        (mean, variance), (old_mean, old_variance) = now[name], was[name]
        running = _state(dense[name])
        ratio = torch.where(old_variance > 0, variance / old_variance, 1.0)
        # What the running mean is off by in the dense model shrinks as its spread does.
        state[name] = mean + (running[0] - old_mean) * ratio.sqrt(), running[1] * ratio
    return state


def _state(part: Any) -> tuple[Tensor, Tensor]:
    return part.running_mean.clone(), part.running_var.clone()


@torch.no_grad()
def set_moments(model: nn.Module, state: State) -> None:
    """Give batch norms these running means and variances."""
    norms = batch_norms(model)
    for name, (mean, variance) in state.items():
        norms[name].running_mean.copy_(mean)
        norms[name].running_var.copy_(variance)
