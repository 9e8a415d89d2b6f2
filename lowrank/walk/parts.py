"""Hold the weights that a model fuses, experts among them, as layers for a while.

Everything that looks for layers does so inside of `separate_parts`: it then meets every expert of a
mixture, the projections of nn.MultiheadAttention, the matrices of recurrent nets and the groups of
convolutions as plain layers, and nothing else needs to know of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from torch import nn

from ..nn.split_linear import split_outputs
from ..nn.splits import obstacle_to_split, split_module
from ..nn.unfused import Parameters, Unfused, fuse
from .experts import join_experts, split_experts
from .surgery import module_at, modules_of, own_memory

Undo = list[Callable[[], None]]
_UNDO: ContextVar[Undo | None] = ContextVar("undo", default=None)  # of the innermost context
Verb = TypeVar("Verb", bound=Callable[..., Any])


def parts_apart(verb: Verb) -> Verb:
    """A function of a model that meets every part as a layer, see `separate_parts`."""

    @functools.wraps(verb)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with separate_parts(model):
            return verb(model, *args, **kwargs)

    return cast(Verb, call)


@contextmanager
def separate_parts(model: nn.Module) -> Iterator[None]:
    """A context in which fused weights are layers of their own, where this is possible.

    Afterwards what was not replaced is what it was before. Inside of another such context all is
    split already; to what is no model nothing happens.
    """
    undo: Undo = []
    token = _UNDO.set(undo)
    try:
        if isinstance(model, nn.Module):
            _split_modules(model, undo)
            split_experts(model, undo)
        yield
    finally:
        _UNDO.reset(token)
        for step in reversed(undo):
            step()


def separate_linear(model: nn.Module, name: str, sizes: Sequence[int]) -> Callable[[], None]:
    """Hold one linear layer as several until the end of the innermost `separate_parts`.

    Args:
        sizes: of their outputs; together those of the layer.

    Returns:
        What puts it back before.
    """
    undo, module, before = _UNDO.get(), module_at(model, name), Parameters()
    put_back = functools.partial(_join, module, before)
    if undo is not None:
        undo.append(put_back)
    before.update(split_outputs(module, sizes))
    return put_back


def join_parts(model: nn.Module) -> None:
    """Put parts of which none is factored back together, in all of a model."""
    join_experts(model)
    for module in {id(m): m for _, m in modules_of(model)}.values():
        if isinstance(module, Unfused):
            _join(module, {})


def _split_modules(model: nn.Module, undo: Undo) -> None:
    for module in {id(m): m for _, m in modules_of(model)}.values():
        if obstacle_to_split(module) == "":
            before = Parameters()
            undo.append(functools.partial(_join, module, before))
            before.update(split_module(module))


def _join(module: nn.Module, before: Parameters) -> None:
    """Make one module whole again, if all of its layers are dense."""
    if not isinstance(module, Unfused):
        return
    if module.is_dense:
        fuse(module, before)
    else:
        own_memory(module.layers().values())
