"""Which layers a model lets go: tried with stand-ins, which compute the same under another class.

A model that asks `isinstance(layer, nn.Linear)`, or that calls a layer through a reference of its
own (a plain list, a closure), would pass over a factored layer, or go on with the dense one. A
layer of several calls, only some of which ask, is not found: that takes a run to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..types import Site
from ..walk.surgery import swap
from .running import Run, quiet


class StandIn(nn.Module):
    """Calls a layer in its place, and counts; all other attributes are the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.calls = 0
        self.training = layer.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__["_modules"]
        return own[name] if name in own else getattr(own["layer"], name)


class _Placed:
    """Stand-ins for the modules of sites.

    A layer that is the model itself has none: whoever calls it holds it.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.groups = {
            site.name: [StandIn(module) for module in site.modules]
            for site in sites
            if all(module is not model for module in site.modules)
        }
        self.each = [one for group in self.groups.values() for one in group]

    def suffice(self, calls: Mapping[str, int]) -> bool:
        """Whether they were called as often as the layers behind them."""
        counted = ((calls.get(name, 0), group) for name, group in self.groups.items())
        return all(sum(one.calls for one in group) >= count for count, group in counted)


@contextmanager
def stood_in(model: nn.Module, sites: Sequence[Site]) -> Iterator[_Placed]:
    """A context in which stand-ins are in the places of the sites."""
    placed = _Placed(model, sites)
    try:
        swap(model, {id(one.layer): one for one in placed.each})
        yield placed
    finally:
        swap(model, {id(one): one.layer for one in placed.each})


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
