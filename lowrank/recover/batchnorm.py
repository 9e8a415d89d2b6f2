"""Re-estimate batch-norm statistics after compression, where that helps.

A compressed layer's outputs have another mean and a smaller variance, while the next norm still
uses those of the dense layer. Both can be re-estimated (Jung et al., arXiv 1712.01048, and many
after). On few images, without training-time augmentation, such estimates are biased even for the
dense model; so the running statistics are shifted by the difference between the compressed and the
dense model on the same images, which leaves a dense model unchanged. Where layers were fitted to
the dense outputs it may still do harm: it is kept only if it lowers held-out KL.
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
    """Batch norms with a running mean and variance, by name."""
    return {name: part for name, part in model.named_modules() if keeps_moments(part)}


def bn_recalibrate(
    model: nn.Module,
    data: Data,
    *,
    reference: nn.Module,
    held_out: Sequence[Batch] | None = None,
) -> bool:
    """Re-estimate the running means and variances of a compressed model, if that lowers its KL.

    They are corrected by the difference between the compressed and the dense model on the same
    data; exact where compression only scaled and shifted a layer's outputs.

    Args:
        model: changed only if its mean KL from `reference` on the held-out rows falls.
        data: what is estimated from; as for `compress`, but not a callable.
        reference: the dense model, with norms of the same names.
        held_out: batches to judge on; None takes the last tenth of `data`.

    Returns:
        Whether the new statistics were kept.

    Raises:
        LowrankError: the data is a callable, or the models have no batch norm in common.
    """
    batches = materialise(data)
    if callable(batches):
        raise LowrankError("bn_recalibrate needs batches to run the models on, not a callable")
    norms = batch_norms(model)
    if not norms.keys() & batch_norms(reference).keys():
        raise LowrankError("the two models have no batch norm with running statistics in common")
    held = list(held_out or ())
    if not held:
        fitted, kept = split(len(batches))
        batches, held = [batches[i] for i in fitted], [batches[i] for i in kept]
    before, after = recalibrated(model, batches, Reference(reference, held))
    return after < before


def recalibrated(
    model: nn.Module, batches: Sequence[Batch], judge: Reference
) -> tuple[float, float]:
    """`bn_recalibrate` with the dense model and the held-out rows of a judge.

    Returns:
        The judge's measure before and after; equal if nothing was changed.

    Raises:
        LowrankError: there are no predictions to judge by.
    """
    before, reference = judge.judged(model), judge.model
    old = {name: _state(part) for name, part in batch_norms(model).items()}
    set_moments(model, moved(reference, gathered(model, batches), gathered(reference, batches)))
    after = judge.judged(model)
    if after < before:
        return before, after
    set_moments(model, old)
    return before, before


def gathered(model: nn.Module, batches: Sequence[Batch]) -> State:
    """Mean and variance (channels,) of each batch norm's input, pooled over all batches.

    Meanwhile norms use batch statistics, for which torch wants more than one value per channel. A
    norm that is not called is left out. The model is not changed.
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
    """Normalise with batch statistics, and leave running ones unchanged."""
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
    """The dense model's running statistics, corrected for the compressed model.

    Args:
        now, was: `gathered` of the compressed and of the dense model.
    """
    state, dense = State(), batch_norms(reference)
    for name in now.keys() & was.keys() & dense.keys():
        (mean, variance), (old_mean, old_variance) = now[name], was[name]
        running = _state(dense[name])
        ratio = torch.where(old_variance > 0, variance / old_variance, 1.0)
        # The offset of the running mean scales with the standard deviation.
        state[name] = mean + (running[0] - old_mean) * ratio.sqrt(), running[1] * ratio
    return state


def _state(part: Any) -> tuple[Tensor, Tensor]:
    return part.running_mean.clone(), part.running_var.clone()


@torch.no_grad()
def set_moments(model: nn.Module, state: State) -> None:
    """Set the running means and variances of batch norms."""
    norms = batch_norms(model)
    for name, (mean, variance) in state.items():
        norms[name].running_mean.copy_(mean)
        norms[name].running_var.copy_(variance)
