"""Running a chain of blocks one at a time, on hidden states that are carried from block to block.

What a block is given besides the hidden states (masks, positions, an encoder's output) is recorded
in a pass of the whole model. Nothing is known of architectures: the hidden state is the tensor that
a block's predecessor gave out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.running import SameTensor, first_tensor, forward, quiet, without_cache
from ..errors import LowrankError
from ..walk.surgery import module_at

Path = tuple[Any, ...]


@dataclass
class _Call:
    """What one block was given: everything, and where the hidden state stands in it."""

    given: tuple[Any, Any]
    path: Path


class Chain:
    """The blocks of one chain and the hidden states that the next of them will read.

    Attributes:
        names: of the blocks, in order.
        hidden: what the block at hand reads, one tensor a batch.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> None:
        """Run the model on all batches.

        Raises:
            LowrankError: a block is not called once in every pass, after its predecessor.
        """
        self.names = tuple(names)
        self._blocks = [module_at(model, name) for name in names]
        self._calls: list[list[_Call]] = []
        self._out: Path | None = None
        self.hidden: list[Tensor] = []
        with quiet(model), without_cache(model):
            for batch in batches:
                self._record(model, batch)

    def refresh(self, model: nn.Module) -> None:
        """Take the blocks anew: one that is itself a layer may have been replaced."""
        self._blocks = [module_at(model, name) for name in self.names]

    def block(self, index: int) -> nn.Module:
        return self._blocks[index]

    def run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """The hidden state that block `index` makes of `hidden`; gradients pass."""
        call = self._calls[batch][index]
        args, kwargs = _put(call.given, call.path, hidden)
        output = self._blocks[index](*args, **kwargs)
        found = _get(output, self._out) if self._out is not None else first_tensor(output)
        if not isinstance(found, Tensor):
            raise LowrankError(f"{self.names[index]}: its output holds no hidden state")
        return found

    def outputs(self, index: int) -> list[Tensor]:
        """What block `index` makes of the hidden states at hand, without gradients."""
        block = self._blocks[index]
        with quiet(block):
            return [self.run(index, batch, hidden) for batch, hidden in enumerate(self.hidden)]

    def _record(self, model: nn.Module, batch: Batch) -> None:
        calls: list[_Call] = []
        last: list[tuple[Path, Tensor, SameTensor]] = []

        def before(index: int) -> Any:
            def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
                if len(calls) != index:
                    raise LowrankError(f"{self.names[index]} is called out of its chain's order")
                calls.append(_Call((args, kwargs), self._link(last, (args, kwargs))))

            return hook

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            last[:] = [(path, tensor, SameTensor(tensor)) for path, tensor in _leaves(output)]

        with ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                handles = (
                    block.register_forward_pre_hook(before(index), with_kwargs=True),
                    block.register_forward_hook(after),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            forward(model, batch)
        if len(calls) != len(self._blocks):
            raise LowrankError(f"{len(calls)} of {len(self._blocks)} blocks of a chain were called")
        calls[0].path = calls[1].path
        first = _get(calls[0].given, calls[0].path)
        if not isinstance(first, Tensor):
            raise LowrankError(f"{self.names[0]} is called in another way than the next block")
        self.hidden.append(first)
        for call in calls:  # hidden states are carried, not kept
            call.given = _put(call.given, call.path, None)
        self._calls.append(calls)

    def _link(self, last: Sequence[tuple[Path, Tensor, SameTensor]], given: Any) -> Path:
        """Where the previous block's output stands in what a block is given."""
        for path, tensor in _leaves(given):
            for out, _, same in last:
                if same(tensor):
                    self._out = out if self._out is None else self._out
                    return path
        if last:
            raise LowrankError("a block of a chain does not read its predecessor's output")
        return ()


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))


def _get(value: Any, path: Path) -> Any:
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _put(value: Any, path: Path, new: Any) -> Any:
    """A copy of the nest with another leaf."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {**value, key: _put(value[key], rest, new)}
    items = list(value)
    items[key] = _put(items[key], rest, new)
    return type(value)(items)
