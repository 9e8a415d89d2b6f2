"""What methods made of one layer, or of one group of layers: each thing once, and under watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..types import Curve, Option, Statistics

M = TypeVar("M")  # a method, of one layer or joint
N = TypeVar("N")  # what it makes at one option
T = TypeVar("T")
Look = Callable[[], Mapping[str, Any]]


@dataclass
class _Made(Generic[M, N]):
    """By one method object, up to now."""

    method: M
    curve: Curve
    modules: dict[Option, N] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)


class Memo(Generic[M, N]):
    """Curve and modules of a method object, by calls that are watched.

    Equal methods share nothing: it is the object that counts. `look` gives all that a call could
    change but must not, as comparable values.
    """

    def __init__(self) -> None:
        self._made: list[_Made[M, N]] = []

    def curve(self, method: M, make: Callable[[M], Curve], look: Look) -> Curve:
        """`make(method)`, called once."""
        if all(made.method is not method for made in self._made):
            curve, changed = _watched(partial(make, method), look)
            self._made.append(
                _Made(method, curve, changed=[f"{what} by the curve" for what in changed])
            )
        return self._of(method).curve

    def built(
        self, method: M, options: Sequence[Option], make: Callable[[M, Option], N], look: Look
    ) -> Iterator[tuple[Option, N]]:
        """Options of its curve, each with `make(method, option)`, called once, when needed."""
        made = self._of(method)
        for option in options:
            if option not in made.modules:
                new, changed = _watched(partial(make, method, option), look)
                made.modules[option] = new
                made.changed += [f"{what} at size {option.size}" for what in changed]
            yield option, made.modules[option]

    def changed(self, method: M) -> list[str]:
        """What the calls up to now changed, each with where."""
        return self._of(method).changed

    def _of(self, method: M) -> _Made[M, N]:
        return next(made for made in self._made if made.method is method)


def _watched(call: Callable[[], T], look: Look) -> tuple[T, list[str]]:
    """What it gives, and what is not as it was before."""
    before = look()
    result = call()
    after = look()
    return result, [what for what in {**before, **after} if before.get(what) != after.get(what)]


def snapshot(module: nn.Module, stats: Statistics) -> dict[str, Any]:
    """All that a method could change of what it is given, and the global generator."""
    state: dict[str, Any] = {"the global generator": torch.get_rng_state().numpy().tobytes()}
    for name, part in module.named_modules():
        held = vars(part).items()
        plain = {key: value for key, value in held if not isinstance(value, dict)}
        inner = {key: list(value) for key, value in held if isinstance(value, dict)}
        state[f"the module {name!r}"] = (id(part), plain, inner)  # flags, hooks, names
    for name, tensor in tensors_of(module, stats).items():
        data = tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()
        place = (id(tensor), tensor.data_ptr(), tensor._version)
        state[name] = (*place, tensor.requires_grad, tensor.grad is None, data)
    return state


def tensors_of(module: nn.Module, stats: Statistics) -> dict[str, Tensor]:
    """All tensors that a method is given, by name."""
    named = {**module.state_dict(keep_vars=True), **vars(stats)}
    return {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}
