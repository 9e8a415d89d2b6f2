"""Chains of blocks, run one block at a time on hidden states that are carried from block to block.

What a block is given besides the hidden states (masks, positions, an encoder's output) is recorded
in a pass of the whole model. Nothing is known of architectures: the hidden state is the tensor that
a block's predecessor gave out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..calibration.batches import ROWS, Batch, rebatched
from ..calibration.running import SameTensor, first_tensor, forward, mask_of, quiet, without_cache
from ..calibration.statistics import Calibration
from ..errors import LowrankError
from ..measure.eval import Reference
from ..walk.surgery import factored, module_at

HELD_OUT = 8  # where no rows were held out, one batch in so many is judged on
KEPT_BYTES = 1 << 28  # of the dense model's predictions on those rows
Path = tuple[Any, ...]


@dataclass
class _Call:
    """What one block was given: everything, and where the hidden state stands in it."""

    given: tuple[Any, Any]
    path: Path


@dataclass
class Recording:
    """What the blocks of one chain were given in passes of the whole model, by batch.

    Attributes:
        names: of the blocks, in order.
        hidden: what the first block read.
        calls: what each block was given besides.
        out: where the hidden state stands in a block's output.
    """

    names: tuple[str, ...]
    hidden: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, list[_Call]] = field(default_factory=dict)
    out: Path | None = None

    def record(self, model: nn.Module, number: int, batch: Batch) -> None:
        """Run the model on one batch.

        Raises:
            LowrankError: a block is not called once, after its predecessor.
        """
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
            for index, name in enumerate(self.names):
                block = module_at(model, name)
                handles = (
                    block.register_forward_pre_hook(before(index), with_kwargs=True),
                    block.register_forward_hook(after),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            forward(model, batch)
        self._keep(number, calls)

    def _keep(self, number: int, calls: list[_Call]) -> None:
        if len(calls) != len(self.names):
            raise LowrankError(f"{len(calls)} of {len(self.names)} blocks of a chain were called")
        calls[0].path = calls[1].path
        first = _get(calls[0].given, calls[0].path)
        if not isinstance(first, Tensor):
            raise LowrankError(f"{self.names[0]} is called in another way than the next block")
        for call in calls:  # hidden states are carried, not kept
            call.given = _put(call.given, call.path, None)
        self.hidden[number], self.calls[number] = first, calls

    def _link(self, last: Sequence[tuple[Path, Tensor, SameTensor]], given: Any) -> Path:
        """Where the previous block's output stands in what a block is given."""
        for path, tensor in _leaves(given):
            for out, _, same in last:
                if same(tensor):
                    self.out = out if self.out is None else self.out
                    return path
        if last:
            raise LowrankError("a block of a chain does not read its predecessor's output")
        return ()


class Chain:
    """The blocks of a model on recorded calls, and the hidden states that the next of them reads.

    Attributes:
        names: of the blocks, in order.
        hidden: what the block at hand reads, one tensor a batch.
    """

    def __init__(self, model: nn.Module, recording: Recording, numbers: Sequence[int]) -> None:
        """At the first block.

        Args:
            numbers: of the recorded batches that run along.
        """
        self.names = recording.names
        self.hidden = [recording.hidden[number] for number in numbers]
        self._calls = [recording.calls[number] for number in numbers]
        self._out = recording.out
        self.refresh(model)

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
        made = _get(output, self._out) if self._out is not None else first_tensor(output)
        if not isinstance(made, Tensor):
            raise LowrankError(f"{self.names[index]}: its output holds no hidden state")
        return made

    def outputs(self, index: int) -> list[Tensor]:
        """What block `index` makes of the hidden states at hand, without gradients."""
        block = self._blocks[index]
        with quiet(block):
            return [self.run(index, batch, hidden) for batch, hidden in enumerate(self.hidden)]


class Workbench:
    """The dense model with the rows that its compression is fitted to and judged on.

    Whatever does not depend on the compression is computed once for all that is tried on it: what
    blocks are given, and the dense model's predictions.

    Attributes:
        batches: those that layers are fitted to, and after them those held out.
        fitted: how many are of the first sort.
        judge: the dense model's predictions on the rows that choices are judged by.
        judged_on_seen: no rows were held out, so that the last of the others serve.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, rows: int = ROWS) -> None:
        """
        Args:
            rows: of a batch.

        Raises:
            LowrankError: the data is a callable, which holds no rows.
        """
        if callable(calibration.batches):
            raise LowrankError("recovery runs the model on batches: pass data=… that holds them")
        self.model, self.calibration = model, calibration
        batches = rebatched(calibration.batches, rows)
        self.fitted = len(batches)
        self.batches = batches + rebatched(calibration.held_out, rows)
        self.masks = [mask_of(batch) for batch in self.batches]
        few = max(self.fitted // HELD_OUT, 1)
        self.judged_on_seen = not calibration.held_out
        self.judge = Reference(model, calibration.held_out or batches[-few:], most=KEPT_BYTES)
        self._recordings: dict[tuple[str, ...], Recording] = {}

    def numbers(self, most: int | None = None) -> tuple[list[int], int]:
        """Numbers of the batches that run along, and how many of them, the first ones, are for
        fitting: at most so many, None for all."""
        fitted = self.fitted if most is None else min(most, self.fitted)
        return [*range(fitted), *range(self.fitted, len(self.batches))], fitted

    def dense_chain(self, names: Sequence[str], numbers: Sequence[int]) -> Chain:
        """The dense model's chain of these blocks."""
        recording = self._recordings.setdefault(tuple(names), Recording(tuple(names)))
        self._record(self.model, recording, numbers)
        return Chain(self.model, recording, numbers)

    def chain(self, student: nn.Module, names: Sequence[str], numbers: Sequence[int]) -> Chain:
        """The same of a twin, to be called after `dense_chain`. One that is still dense is given
        what the dense model is given."""
        if not factored(student):
            return Chain(student, self._recordings[tuple(names)], numbers)
        recording = Recording(tuple(names))
        self._record(student, recording, numbers)
        return Chain(student, recording, numbers)

    def _record(self, model: nn.Module, recording: Recording, numbers: Sequence[int]) -> None:
        with quiet(model), without_cache(model):
            for number in numbers:
                if number not in recording.calls:
                    recording.record(model, number, self.batches[number])


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
