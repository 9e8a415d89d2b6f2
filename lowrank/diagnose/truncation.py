"""How many of the features can be zeroed at a given loss: activation sparsity of any activation.

As in the Sparsing Law (arXiv 2411.02335): of every vector the smallest numbers are zeroed, as many
as hold no more than a share of its energy, the share is the same in all layers, and it is raised
until the model's predictions have moved as far as is allowed. There the contributions of neurons to
the output of a feed-forward block are weighed, and the loss is perplexity; here the features of any
layer by themselves, and the loss is the KL to the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.running import first_tensor, remade
from ..calibration.statistics import followed
from ..measure.eval import Reference
from ..plans.progress import steps
from ..walk.surgery import twin
from .layer_inputs import Tap

HALVINGS = 8


def smallest(features: Tensor, share: float) -> Tensor:
    """Where each vector's smallest numbers lie that hold at most this share of its energy.

    Args:
        features: (…, features).

    Returns:
        bool, of that shape; zeros are always among them.
    """
    energy, order = features.double().square().sort(-1)
    summed = energy.cumsum(-1)
    gone = summed <= share * summed[..., -1:]
    return torch.zeros_like(gone).scatter(-1, order, gone) | (features == 0)


def dropped_at(
    model: nn.Module,
    taps: Sequence[Tap],
    batches: Sequence[Batch],
    loss: float,
    *,
    progress: bool = False,
) -> tuple[dict[str, float], str]:
    """The share of zeroed features of each layer, by name, at that loss; and the loss's measure.

    The share of energy is found by bisection of its root in [0, 1]: the result stays below the
    loss, and is within 1/256 of it in that root.
    """
    batches = followed(model, batches)[1]
    reference = Reference(twin(model), batches)  # the twin stays as it is
    below, above = 0.0, 1.0
    found = _Truncated(model, taps, 0.0).shares(reference)[1]
    for _ in steps(range(HALVINGS), "share", progress):
        middle = (below + above) / 2
        away, shares = _Truncated(model, taps, middle**2).shares(reference)
        if away <= loss:
            below, found = middle, shares
        else:
            above = middle
    return found, reference.measure


class _Truncated:
    """The model with the smallest features of each layer zeroed."""

    def __init__(self, model: nn.Module, taps: Sequence[Tap], share: float) -> None:
        self.model, self.taps, self.share = model, taps, share
        self.gone = {tap.name: 0 for tap in taps}
        self.all = dict(self.gone)

    def shares(self, reference: Reference) -> tuple[float, dict[str, float]]:
        with ExitStack() as stack:
            for tap in self.taps:
                hook = tap.module.register_forward_pre_hook(self._hook(tap), with_kwargs=True)
                stack.callback(hook.remove)
            away = reference.away(self.model)
        return away, {name: self.gone[name] / n for name, n in self.all.items() if n}

    def _hook(self, tap: Tap) -> Callable[..., Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            tensor = first_tensor((args, kwargs))
            if tensor is None or not tensor.numel() or not tensor.is_floating_point():
                return None
            gone = smallest(tap.features_last(tensor), self.share)
            self.gone[tap.name] += int(gone.sum())
            self.all[tap.name] += gone.numel()
            gone = (gone.movedim(-1, 1) if tap.axes else gone).reshape(tensor.shape)
            return _with(tensor, tensor.masked_fill(gone, 0), (args, kwargs))

        return before


def _with(old: Tensor, new: Tensor, value: Any) -> Any:
    """The arguments of a layer with one tensor in the place of another."""
    if isinstance(value, tuple | list):
        return remade(value, [_with(old, new, item) for item in value])
    if isinstance(value, dict):
        return {key: _with(old, new, item) for key, item in value.items()}
    return new if value is old else value
