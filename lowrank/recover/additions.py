"""Layers whose output is added to a stream, such as the two of a block that end in a residual sum.

No architecture is assumed, and no name: in one run of the dense model, a layer is such a one if a
tensor that some module read before and the layer's output add up to a tensor that is seen after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..calibration.running import input_of, quiet, takes_hooks
from ..walk.surgery import module_at, modules_of

NUMBERS = 4096  # of each tensor that are compared
NEAR = 64  # tensors before and after a layer among which a stream and a sum are looked for
ROUNDING = 4  # units of the dtype's rounding, of the summands


@dataclass
class _Seen:
    """Some numbers of a tensor that was passed on, the first of them, and the tensor's shape."""

    numbers: Tensor
    first: float
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        few = tensor.detach()[:1] if tensor.ndim > 2 else tensor.detach()
        numbers = few.reshape(-1)[:NUMBERS].clone()
        return cls(numbers, float(numbers[0]) if len(numbers) else 0.0, tensor.shape)

    def is_sum_of(self, left: _Seen, right: _Seen) -> bool:
        if not self.shape == left.shape == right.shape:
            return False
        if not self.numbers.dtype == left.numbers.dtype == right.numbers.dtype:
            return False
        rounding = ROUNDING * torch.finfo(self.numbers.dtype).eps
        off = abs(self.first - left.first - right.first)
        if off > rounding * (abs(left.first) + abs(right.first)):  # most pairs end here
            return False
        total, most = left.numbers + right.numbers, left.numbers.abs() + right.numbers.abs()
        return bool(((self.numbers.to(total) - total).abs() <= rounding * most).all())


@dataclass
class _Call:
    """A call of a layer: what modules had read before it, what it returned, and what came after."""

    reads: list[tuple[str, _Seen]]
    output: _Seen | None = None
    after: list[_Seen] = field(default_factory=list)

    def streams(self) -> list[str]:
        """The modules that read what the output is added to, the last one first."""
        own = self.output
        if own is None or not bool(own.numbers.any()):
            return []
        return [
            name
            for name, read in reversed(self.reads)
            if any(total.is_sum_of(read, own) for total in self.after)
        ]


class _Watch:
    """Hooks that note calls of layers.

    Attributes:
        calls: of each layer, in order.
        counts: how often each module was called.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.calls: dict[str, list[_Call]] = {}
        self.counts: dict[str, int] = {}
        self._reads: dict[int, list[tuple[str, _Seen]]] = {}  # in the how-manieth call

    def before(self, name: str, _module: nn.Module, args: object, kwargs: object) -> None:
        number = self.counts.setdefault(name, 0)
        self.counts[name] += 1
        tensor = input_of(args, kwargs)
        if tensor is None or not tensor.is_floating_point():
            return
        seen = _Seen.of(tensor)
        self._follows(seen)
        # Only what is read in the same of several calls can be paired with a layer's own input.
        reads = self._reads.setdefault(number, [])
        reads.append((name, seen))
        if name in self.names:
            self.calls.setdefault(name, []).append(_Call(reads[-NEAR:]))

    def after(self, name: str, _module: nn.Module, _args: object, output: object) -> None:
        tensor = input_of(output)
        if tensor is None or not tensor.is_floating_point():
            return
        seen = _Seen.of(tensor)
        self._follows(seen)
        for call in self.calls.get(name, [])[-1:]:
            call.output = call.output or seen

    def _follows(self, seen: _Seen) -> None:
        for calls in self.calls.values():
            for call in calls:
                if call.output is not None and len(call.after) < NEAR:
                    call.after.append(seen)

    def streams(self) -> dict[str, str]:
        """Of each layer, the module that reads the stream in every call."""
        found: dict[str, str] = {}
        for name, calls in self.calls.items():
            first, *others = [call.streams() for call in calls]
            count = self.counts[name]
            for read in first:
                if self.counts[read] == count and all(read in other for other in others):
                    found[name] = read
                    break
        return found


def added_to(
    model: nn.Module, names: Collection[str], run: Callable[[], object], within: str = ""
) -> dict[str, str]:
    """The layers of a model whose output is added to a stream, each with a module that reads the
    stream before; both are called equally often.

    Args:
        names: of the layers.
        run: runs the model, or the module `within`.
        within: the name of the module in which all that counts is called.
    """
    watch, handles = _Watch(names), []
    modules = {module: name for name, module in modules_of(module_at(model, within), within)}
    try:
        for module, name in modules.items():
            if not takes_hooks(module):
                continue
            hook, end = partial(watch.before, name), partial(watch.after, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            handles.append(module.register_forward_hook(end))
        with quiet(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return watch.streams()
