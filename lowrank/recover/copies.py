"""Which parameters recovery trains, and how they come to be a compressed copy's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from ..nn import is_factored

Pairs = dict[int, tuple[Tensor, Tensor]]  # the model's own, and the copy in its place


def factors_in(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of all factored layers inside, each once, in the model's order."""
    unique = {
        id(parameter): parameter
        for part in module.modules()
        if is_factored(part)
        for parameter in part.parameters()
    }
    return list(unique.values())


def own_vectors(module: nn.Module, pairs: Pairs) -> list[nn.Parameter]:
    """Norm weights and biases inside (one dimension), made copies of their own.

    Args:
        pairs: by the id of the shared parameter, it and its copy; added to, so that a vector that
            stands in two places stays one.
    """
    factors: dict[int, nn.Parameter] = {}
    copies = {id(copy) for _, copy in pairs.values()}
    inside = {id(p) for p in factors_in(module)}
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is None or parameter.ndim != 1 or id(parameter) in inside:
                continue
            if not parameter.is_floating_point():
                continue
            if id(parameter) not in copies:
                if id(parameter) not in pairs:
                    fresh = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                    pairs[id(parameter)] = (parameter, fresh)
                    copies.add(id(fresh))
                parameter = cast(nn.Parameter, pairs[id(parameter)][1])
                part._parameters[key] = parameter
            factors[id(parameter)] = parameter
    return list(factors.values())


def own_buffers(parts: Iterable[nn.Module], names: Iterable[str], pairs: Pairs) -> None:
    """Make these buffers copies of their own; added to `pairs` as vectors are."""
    for part in parts:
        for name in names:
            buffer = part._buffers.get(name)
            if buffer is not None:
                copy = pairs.setdefault(id(buffer), (buffer, buffer.clone()))[1]
                part._buffers[name] = copy


@torch.no_grad()
def hand_over(pairs: Pairs, model: nn.Module, target: nn.Module) -> None:
    """Give a model the values that the copies came to have.

    Args:
        model: whose own tensors the pairs begin with.
        target: it, or a copy of it that was compressed: tensors are found by their names.
    """
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    there = dict((*target.named_parameters(), *target.named_buffers()))
    for original, trained in pairs.values():
        there[names[id(original)]].copy_(trained)
