"""The parameters that recovery trains, and giving a compressed twin copies of its own of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from ..nn import is_factored

Pairs = dict[int, tuple[Tensor, Tensor]]  # id of the original -> (original, its copy)


def factors_in(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of all factored layers in a module, each once, in the module's order."""
    unique = {
        id(parameter): parameter
        for part in module.modules()
        if is_factored(part)
        for parameter in part.parameters()
    }
    return list(unique.values())


def own_vectors(module: nn.Module, pairs: Pairs) -> list[nn.Parameter]:
    """Replace one-dimensional parameters (norm weights, biases) by copies, and return these.

    Args:
        pairs: id of each shared parameter -> (it, its copy); extended here, so that a parameter
            used in two places gets one copy.
    """
    vectors: dict[int, nn.Parameter] = {}
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
            vectors[id(parameter)] = parameter
    return list(vectors.values())


def own_buffers(parts: Iterable[nn.Module], names: Iterable[str], pairs: Pairs) -> None:
    """Replace these buffers by copies; `pairs` is extended as in `own_vectors`."""
    for part in parts:
        for name in names:
            buffer = part._buffers.get(name)
            if buffer is not None:
                copy = pairs.setdefault(id(buffer), (buffer, buffer.clone()))[1]
                part._buffers[name] = copy


@torch.no_grad()
def hand_over(pairs: Pairs, model: nn.Module, target: nn.Module) -> None:
    """Write the values of the copies into a model.

    Args:
        model: the owner of the originals in `pairs`.
        target: the same model or a compressed copy of it; tensors are matched by name.
    """
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    tensors = dict((*target.named_parameters(), *target.named_buffers()))
    for original, trained in pairs.values():
        tensors[names[id(original)]].copy_(trained)
