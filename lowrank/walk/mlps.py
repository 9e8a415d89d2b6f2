"""Find a model's MLPs by what they compute in a run, and say why other modules are none.

A candidate is a module of two or three linear layers and no other tensor. It is an MLP if all but
one of them read its input, the product of an activation of one with the other, or the activation of
the only one, is what the last reads, and the last one's output is the module's: each of these is
compared in numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LowrankError
from ..nn import is_factored
from ..nn.routed_mlp import ACTIVATIONS, RoutedMLP
from . import layouts
from .surgery import modules_of

ROWS = 64  # compared in a trial
ROUNDING = 64  # times the rounding of a product of activations, float32; of halves four times
LINEAR = "identity"
NOT_SEEN = "the data did not reach it"


class MLP(NamedTuple):
    """A module y = down(act(gate(x)) · up(x)), or down(act(up(x))).

    Attributes:
        name: the first one that the module has.
        layers: names of its children: gate, up and down, or up and down.
        activation: its name in `lowrank.nn.routed_mlp.ACTIVATIONS`.
    """

    name: str
    module: nn.Module
    layers: tuple[str, ...]
    activation: str

    def linears(self) -> dict[str, Any]:
        """Its layers by name."""
        return {name: self.module._modules[name] for name in self.layers}

    @property
    def neurons(self) -> int:
        last: Any = self.module._modules[self.layers[-1]]
        return int(last.in_features)


def find_mlps(model: nn.Module, run: Callable[[], object]) -> tuple[list[MLP], dict[str, str]]:
    """The MLPs of a model in its order, and by name why other candidates are none.

    Args:
        run: runs the model on some data; the first call of each module is looked at.
    """
    names: dict[int, str] = {}
    candidates: dict[int, nn.Module] = {}
    for name, module in modules_of(model):
        if _linears(module) and not is_factored(module):
            names.setdefault(id(module), name)
            candidates[id(module)] = module
    reasons = {key: reason for key, m in candidates.items() if (reason := _obstacle(m))}
    watches = {key: _Watch(m) for key, m in candidates.items() if key not in reasons}
    with _watched(watches.values()):
        run()
    found = []
    for key, watch in watches.items():
        if watch.activation:
            mlp = MLP(names[key], watch.module, watch.layers, watch.activation)
            found.append(mlp)
        else:
            reasons[key] = watch.reason
    return found, {names[key] or "(root)": reason for key, reason in reasons.items()}


def check_replaces(dense: nn.Module, routed: RoutedMLP, where: str) -> None:
    """Raises LowrankError unless a module has the layers, of the sizes, that an empty one names."""
    for name, child in routed.named_children():
        if child is routed.router:
            continue
        assert isinstance(child, nn.Linear)
        here = dense._modules.get(name)
        wanted = (child.out_features, child.in_features, child.bias is not None)
        if not isinstance(here, nn.Linear):
            raise LowrankError(
                f"{where}: stored as an MLP with a layer {name}, but {type(dense).__name__} has "
                f"{'none' if here is None else type(here).__name__} there: the architectures differ"
            )
        got = (here.out_features, here.in_features, here.bias is not None)
        if got != wanted:
            raise LowrankError(
                f"{where}.{name}: stored as (out, in, bias) = {wanted}, but {type(here).__name__} "
                f"is {got}: the architectures differ"
            )


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    """Its linear layers by name, if they are two or three and hold all of its parameters."""
    found = {k: m for k, m in module._modules.items() if m is not None and layouts.kind(m)}
    held = {id(p) for layer in found.values() for p in layer.parameters()}
    whole = all(id(p) in held for p in module.parameters())
    linear = all(layouts.kind(m) == "linear" for m in found.values())
    distinct = len({id(m) for m in found.values()}) == len(found)
    return found if len(found) in (2, 3) and linear and whole and distinct else {}


def _obstacle(module: nn.Module) -> str:
    """Why a candidate cannot be replaced; "" if it can."""
    if module._forward_hooks or module._forward_pre_hooks or layouts.is_patched(module):
        return "it has hooks, or a wrapped forward, that a new module would lose"
    for name, layer in _linears(module).items():
        if reason := layouts.obstacle(layer):
            return f"{name}: {reason}"
        if type(layer) is not nn.Linear:
            return f"{name} is a {type(layer).__name__}, not an nn.Linear"
    return ""


@contextmanager
def _watched(watches: Any) -> Iterator[None]:
    handles: list[Any] = []
    try:
        for watch in watches:
            handles += watch.hooks()
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Notes the first call of a candidate, and judges it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.reason = module, NOT_SEEN
        self.layers: tuple[str, ...] = ()
        self.activation = ""
        self._done = False
        self._input: Tensor | None = None
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hooks(self) -> list[Any]:
        def noted(name: str) -> Callable[..., None]:
            def hook(_layer: nn.Module, args: Any, output: Any) -> None:
                if not self._done:
                    self._calls.setdefault(name, []).append((_rows(args[0]), _rows(output)))

            return hook

        linears = _linears(self.module).items()
        return [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            *(layer.register_forward_hook(noted(name)) for name, layer in linears),
            self.module.register_forward_hook(self._after),
        ]

    def _before(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._done:
            given = [*args, *kwargs.values()]
            one = len(given) == 1 and isinstance(given[0], Tensor)
            self._input, self._calls = (_rows(given[0]) if one else None), {}

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if not self._done:
            self._done, self.reason = True, self._judged(output)
            self._input, self._calls = None, {}

    def _judged(self, output: Any) -> str:
        """Why the call is not that of an MLP; "" if it is, which is then noted."""
        x, names = self._input, list(_linears(self.module))
        if x is None or not isinstance(output, Tensor):
            return "it reads or gives something else than one tensor"
        if [*map(len, self._calls.values())] != [1] * len(names):
            return "it does not call each of its layers once"
        calls = {name: self._calls[name][0] for name in names}
        readers = [name for name in names if _same(calls[name][0], x)]
        (down, *more) = [name for name in names if name not in readers] or [""]
        if not down or more:
            return "its layers do not all read its input, but the last"
        if not _same(calls[down][1], _rows(output)):
            return "it does not give its last layer's output"
        best, layers, activation = _nearest([(n, calls[n][1]) for n in readers], calls[down][0])
        half = x.dtype.itemsize < torch.float32.itemsize
        if best > (4 if half else ROUNDING) * torch.finfo(x.dtype).eps:
            return f"what its last layer reads is no known activation ({', '.join(ACTIVATIONS)})"
        self.layers, self.activation = (*layers, down), activation
        return ""


def _nearest(
    readers: Sequence[tuple[str, Tensor]], hidden: Tensor
) -> tuple[float, tuple[str, ...], str]:
    """Distance of what the last layer reads from the nearest product, the order of the layers in
    it, and the activation."""
    scale = hidden.double().norm().clamp(min=torch.finfo(torch.float32).tiny)
    found = []
    for (first, inner), *rest in itertools.permutations(readers):
        for name, act in ACTIVATIONS.items():
            if not rest and name == LINEAR:
                continue  # two layers and nothing between them
            product = act(inner)  # in the model's precision, which tells near ones apart
            for _, other in rest:
                product = product * other
            away = float((product.double() - hidden.double()).norm() / scale)
            layers = (first, *(other for other, _ in rest))
            found.append((away, layers, name))
    return min(found, key=lambda each: each[0])


def _rows(value: Any) -> Tensor:
    return value.detach().reshape(-1, value.shape[-1])[:ROWS].clone()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
