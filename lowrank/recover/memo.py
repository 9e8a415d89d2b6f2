"""Outputs of a block's finished layers, so that running the block again does not multiply anew.

Each group of layers is refitted to its inputs, which takes a run of the block up to it: through
layers that will not change any more. What they returned is kept, as far as it does not take too
much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..linalg.mapped import kept
from ..walk.surgery import module_at

MOST = 1 << 29  # bytes of outputs that are kept, of all models that run side by side


class Memo:
    """The outputs of a model's layers, by batch and name: of the first call in each run, whose
    input cannot depend on a layer that is finished later."""

    def __init__(self, most: int = MOST) -> None:
        """
        Args:
            most: bytes to keep; what comes after them is computed anew.
        """
        self._left = most
        self._outputs: dict[tuple[int, str], Tensor] = {}

    @contextmanager
    def used(self, model: nn.Module, batch: int, names: Collection[str]) -> Iterator[None]:
        """A context of one run, in which finished layers return what they did before.

        Args:
            names: the finished layers.
        """
        layers = {name: module_at(model, name) for name in names}
        before = {name: vars(layer).get("forward") for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                vars(layer)["forward"] = self._remembering((batch, name), layer.forward)
            yield
        finally:
            for name, layer in layers.items():
                vars(layer).pop("forward")
                if before[name] is not None:
                    vars(layer)["forward"] = before[name]

    def _remembering(self, key: tuple[int, str], forward: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            known = self._outputs.get(key) if calls == 1 else None
            if known is not None:
                return known.clone()  # what follows may change it in place
            output = forward(*args, **kwargs)
            if calls == 1 and isinstance(output, Tensor) and output.nbytes <= self._left:
                self._left -= output.nbytes
                own = kept(output)
                self._outputs[key] = output.clone() if own is output else own
            return output

        return run
