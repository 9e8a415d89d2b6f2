"""Which layers a model does not call, and which it would not let go.

The latter are tried with stand-ins, which compute the same under another class.

A model that asks `isinstance(layer, nn.Linear)`, or that calls a layer through a reference of its
own (a plain list, a closure), would pass over a factored layer, or go on with the dense one. A
layer of several calls, only some of which ask, is not found: that takes a run to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from ..types import Site
from ..walk.surgery import stood_in
from .running import Run, input_of, quiet, tensors_in


def irreplaceable(
    model: nn.Module, sites: Sequence[Site], calls: Mapping[str, int], run: Run
) -> tuple[str, ...]:
    """The sites that are called less often where stand-ins are in their place, or with which the
    model fails; the model is restored.

    Args:
        calls: how often each site is called in this run; those that are not are passed over.
    """
    called = [site for site in sites if calls.get(site.name)]
    return tuple(_refused(model, called, calls, run))


def _refused(
    model: nn.Module, sites: Sequence[Site], calls: Mapping[str, int], run: Run
) -> list[str]:
    """Those of the sites; where all together do not do, they are tried in halves."""
    if not sites or _runs(model, sites, calls, run):
        return []
    if len(sites) == 1:
        return [sites[0].name]
    half = len(sites) // 2
    parts = (sites[:half], sites[half:])
    return [name for part in parts for name in _refused(model, part, calls, run)]


def _runs(model: nn.Module, sites: Sequence[Site], calls: Mapping[str, int], run: Run) -> bool:
    """Whether stand-ins for all of the sites are called as often as the layers are."""
    with stood_in(model, sites) as stand_ins:
        try:
            with quiet(model):
                run()
        except Exception:  # whatever a model raises that meets an unknown class
            return False
    return stand_ins.suffice(calls)


def bypassed(
    model: nn.Module, sites: Sequence[Site], run: Run
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites whose weights are read in this run though they are not called, and those that are
    called."""
    called: dict[str, None] = {}

    def noted(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if input_of(args, kwargs) is not None:
                called[name] = None

        return hook

    hooks = [
        module.register_forward_pre_hook(noted(site.name), with_kwargs=True)
        for site in sites
        for module in site.modules
    ]
    try:
        with quiet(model), _Operands() as operands:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    read = {id(weight) for weight in operands.parameters}
    passed = (
        site.name
        for site in sites
        if any(id(w) in read for module in site.modules for w in module.parameters(recurse=False))
    )
    return tuple(name for name in passed if name not in called), tuple(called)


class _Operands(TorchFunctionMode):
    """A context that notes the parameters which torch's functions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.parameters: list[nn.Parameter] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # .dtype and .device read no number
            given = tensors_in((args, kwargs or {}))
            self.parameters += (t for t in given if isinstance(t, nn.Parameter))
        return func(*args, **(kwargs or {}))
