"""Where a model cuts what a linear layer returns: queries, keys and values of one product, say.

Seen in a forward pass: the outputs of layers are followed into torch's functions that part a
tensor along its features.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..types import Site

CUTTING = frozenset(
    {"split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"}
)
MOST = 8  # parts
Sizes = tuple[int, ...]


class Cuts(TorchFunctionMode):
    """A context in which the outputs of layers are followed; `hooks` says of which.

    Outputs whose features stand in another axis are followed too, what is computed from them is
    not: q and k of heads that a view interleaves are no rows of the weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ends: dict[str, set[int]] = {}
        self._widths: dict[str, int] = {}
        # Output by id, so that the same tensor is met again: (reference, layer, axis from behind).
        self._outputs: dict[int, tuple[weakref.ref[Tensor], str, int]] = {}

    def hooks(self, site: Site) -> list[Any]:
        """Hooks that follow what a linear layer returns."""

        def after(_module: Any, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim:
                self._widths[site.name] = output.shape[-1]
                self._follow(output, site.name, -1)

        return [module.register_forward_hook(after) for module in site.modules]

    def sizes(self) -> dict[str, Sizes]:
        """The sizes of the parts, by the layer's name; layers that are not cut are left out."""
        found = {}
        for name, ends in self._ends.items():
            inner = {end for end in ends if 0 < end < self._widths[name]}
            if 0 < len(inner) < MOST:
                edges = [0, *sorted(inner), self._widths[name]]
                found[name] = tuple(b - a for a, b in itertools.pairwise(edges))
        return found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], Tensor):
            with suppress(TypeError, ValueError, IndexError, RuntimeError):  # odd arguments
                self._note(getattr(func, "__name__", ""), args[0], args[1:], kwargs or {}, found)
        return found

    def _note(
        self, name: str, tensor: Tensor, rest: Sequence[Any], kwargs: dict[str, Any], found: Any
    ) -> None:
        known = self._outputs.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return
        _, layer, axis = known
        place = tensor.ndim + axis
        ends = self._ends.setdefault(layer, set())
        if name in CUTTING:
            dim = kwargs.get("dim", rest[1] if len(rest) > 1 else 0)
            if isinstance(dim, int) and dim % tensor.ndim == place:
                end = 0
                for part in found:
                    end += part.shape[place]
                    ends.add(end)
        elif name == "narrow" and not kwargs and rest[0] % tensor.ndim == place:
            ends.update((int(rest[1]), int(rest[1]) + int(rest[2])))
        elif name == "__getitem__":
            ends.update(_sliced(rest[0], tensor, place))
        elif name in ("transpose", "swapaxes") and len(rest) == 2:
            axes = [axis % tensor.ndim for axis in rest]
            if place in axes:
                place = axes[1] if place == axes[0] else axes[0]
            self._follow(found, layer, place - tensor.ndim)

    def _follow(self, tensor: Tensor, layer: str, axis: int) -> None:
        self._outputs[id(tensor)] = (weakref.ref(tensor), layer, axis)


def _sliced(index: Any, tensor: Tensor, place: int) -> list[int]:
    """The ends of a plain slice along an axis; none of any other index."""
    given = list(index) if isinstance(index, tuple) else [index]
    if any(not (part is Ellipsis or isinstance(part, slice)) for part in given):
        return []
    if Ellipsis in given:
        at = given.index(Ellipsis)
        given[at : at + 1] = [slice(None)] * (tensor.ndim - len(given) + 1)
    if place >= len(given) or given[place].step not in (None, 1):
        return []
    start, stop, _ = given[place].indices(tensor.shape[place])
    return [start, stop]
