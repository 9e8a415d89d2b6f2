"""Find the fused weights of a mixture's experts, and hold them as a layer for each expert.

A mixture is known by what it does, not by its name: a module with parameters (experts, …, …) of
one leading size, which computes the same from separate layers. That is tried out on a few tokens,
in the ways in which mixtures are handed their routing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.expert_weights import ExpertWeights
from . import layouts
from .surgery import modules_of, own_memory

Fused = dict[str, nn.Parameter]
CHOSEN = 2  # experts of a token, and rows of an expert, in a trial
TOKENS = 8


def split_experts(model: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Make every expert of a mixture a layer of its own, in place, where this is possible.

    On the meta device, where nothing can be tried, transformers' own mark of the layout counts.

    Args:
        undo: what puts them back is appended: weights of which no expert was replaced are then
            what they were.
    """
    known: dict[object, bool | None] = {}  # kinds of mixtures -> whether transposed
    for module in {id(m): m for _, m in modules_of(model)}.values():
        fused = _fused(module)
        if fused:
            kind = (type(module), *((n, p.shape, p.dtype) for n, p in fused.items()))
            if kind not in known:  # only the first block of a large model need be read
                is_meta = any(parameter.is_meta for parameter in fused.values())
                known[kind] = _mark(module) if is_meta else _layout(module, fused)
            transposed = known[kind]
            if transposed is not None:
                undo.append(functools.partial(_join, module, fused))
                split(module, dict.fromkeys(fused, transposed))


def join_experts(model: nn.Module) -> None:
    """Put weights of which no expert is factored back into one parameter, in all of a model."""
    for module in {id(m): m for _, m in modules_of(model)}.values():
        _join(module, {})


def _join(module: nn.Module, before: Fused) -> None:
    """The same in one module.

    Args:
        before: the parameters as they were.
    """
    split_up = {k: c for k, c in module._modules.items() if isinstance(c, ExpertWeights)}
    away = 0  # weights before this one that stay split
    for key, child in sorted(split_up.items(), key=lambda item: item[1].place):
        if not child.is_dense:
            own_memory(child.layers())
            away += 1
            continue
        own = before.get(key)
        if own is None or not _same(own, child):
            own = child.joined()
        del module._modules[key]
        items = list(module._parameters.items())
        items.insert(child.place - away, (key, own))
        module._parameters.clear()
        module._parameters.update(items)


def split(module: nn.Module, transposed: Mapping[str, bool]) -> None:
    """Hold these weights of a module as separate layers.

    Args:
        transposed: by name, whether a weight is (experts, in, out), not (experts, out, in).
    """
    places = {key: place for place, key in enumerate(module._parameters)}
    for key, turned in transposed.items():
        parameter = module._parameters.pop(key)
        assert parameter is not None
        weights = ExpertWeights.split(parameter, transposed=turned, place=places[key])
        module.add_module(key, weights.train(module.training))


def _same(parameter: nn.Parameter, weights: ExpertWeights) -> bool:
    """Whether the layers are still views of the parameter."""
    parts = [p.T if weights.transposed else p for p in parameter.detach().unbind()]
    layers: list[Any] = list(weights.layers())
    return all(
        layer.weight.data_ptr() == part.data_ptr() and layer.weight.dtype == part.dtype
        for layer, part in zip(layers, parts, strict=True)
    )


def _fused(module: nn.Module) -> Fused:
    """Parameters (experts, …, …) of one leading size, by name; none if sizes differ."""
    if layouts.kind(module) is not None:
        return {}
    held = {
        key: parameter
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and min(parameter.shape) > 1
        if parameter.is_floating_point()
    }
    return held if len({len(parameter) for parameter in held.values()}) == 1 else {}


def _mark(module: nn.Module) -> bool | None:
    """What a mixture of transformers says of its layout; None if it says nothing."""
    mark = getattr(module, "is_transposed", None)
    return mark if isinstance(mark, bool) else None


def _layout(module: nn.Module, fused: Fused) -> bool | None:
    """Whether a mixture's weights are transposed, if it computes the same from separate layers;
    None if it does not. The module is as before afterwards."""
    training = module.training
    module.eval()
    try:
        for given in _ways(fused):
            expected = _tried(module, given)
            if expected is None:
                continue
            for transposed in (False, True):
                split(module, dict.fromkeys(fused, transposed))
                try:
                    with _called(module) as called:
                        found = _tried(module, given)
                finally:
                    _join(module, fused)
                if found is not None and called == set(fused) and _equal(found, expected):
                    return transposed
    finally:
        module.train(training)
    return None


def _ways(fused: Fused) -> Iterator[tuple[Any, ...]]:
    """Arguments by which a mixture may be called: rows with the experts chosen and their shares;
    rows sorted by expert, with and without their numbers."""
    first = next(iter(fused.values()))
    count, draw = len(first), torch.Generator().manual_seed(0)
    widths = dict.fromkeys(side for parameter in fused.values() for side in parameter.shape[1:])
    for width in widths:
        rows = torch.randn(TOKENS, width, generator=draw).to(first)
        chosen = torch.stack([torch.randperm(count, generator=draw)[:CHOSEN] for _ in rows])
        share = torch.rand(chosen.shape, generator=draw).to(first)
        yield rows, chosen.to(first.device), share
        each = torch.randn(count * CHOSEN, width, generator=draw).to(first)
        yield each, [CHOSEN] * count
        yield (each,)


@contextmanager
def _called(module: nn.Module) -> Iterator[set[str]]:
    """Collects the names of the weights whose layers run; others were made dense tensors."""
    called: set[str] = set()
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, child in module._modules.items()
        if isinstance(child, ExpertWeights)
        for layer in child.layers()
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _tried(module: nn.Module, given: tuple[Any, ...]) -> Tensor | None:
    """What the module makes of these arguments, without its hooks; None if it takes no such."""
    try:
        with torch.no_grad():
            output = module.forward(*given)
    except Exception:  # any code of a model may run here
        return None
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def _equal(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not bool(expected.isfinite().all()):
        return False
    scale = float(expected.float().abs().max())
    rounding = 64 * torch.finfo(expected.dtype).eps
    return scale > 0 and float((found.float() - expected.float()).abs().max()) <= rounding * scale
