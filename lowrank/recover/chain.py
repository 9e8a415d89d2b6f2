"""Chains of blocks, run one block at a time on hidden states carried from block to block.

The other inputs of a block (masks, positions, an encoder's output) are recorded in a forward pass
of the whole model. No architecture is assumed: the hidden state is the tensor that the previous
block returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..calibration.batches import ROWS, Batch, is_padded, rebatched
from ..calibration.padding import Reals, reals
from ..calibration.running import SameTensor, first_tensor, forward, quiet, without_cache
from ..calibration.statistics import Calibration, followed
from ..errors import LowrankError
from ..measure.eval import Reference
from ..walk.surgery import factored, module_at

HELD_OUT = 8  # without held-out rows, one batch in this many serves to judge
KEPT_BYTES = 1 << 28  # cache of the dense model's logits on those rows
Path = tuple[Any, ...]


@dataclass
class _Call:
    """The arguments of one call of a block, and where the hidden state is among them."""

    given: tuple[Any, Any]
    path: Path


@dataclass
class Recording:
    """The inputs of a chain's blocks in forward passes of the whole model, by batch.

    Attributes:
        names: the blocks, in order.
        hidden: input of the first block.
        calls: the other arguments of each block.
        out: where the hidden state is in a block's output.
    """

    names: tuple[str, ...]
    hidden: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, list[_Call]] = field(default_factory=dict)
    out: Path | None = None

    def record(self, model: nn.Module, number: int, batch: Batch) -> None:
        """Run the model on one batch, and record its blocks' inputs.

        Raises:
            LowrankError: the blocks are not each called once, in the order of the chain.
        """
        calls: list[_Call] = []
        last: list[tuple[Path, Tensor, SameTensor]] = []

        def before(index: int) -> Any:
            def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
                if len(calls) != index:
                    raise LowrankError(f"{self.names[index]} is called out of chain order")
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
            raise LowrankError(f"{self.names[0]} is not called like the next block")
        for call in calls:  # hidden states are carried, not kept
            call.given = _put(call.given, call.path, None)
        self.hidden[number], self.calls[number] = first, calls

    def _link(self, last: Sequence[tuple[Path, Tensor, SameTensor]], given: Any) -> Path:
        """Where the previous block's output is among the arguments of this one."""
        for path, tensor in _leaves(given):
            for out, _, same in last:
                if same(tensor):
                    self.out = out if self.out is None else self.out
                    return path
        if last:
            raise LowrankError("a block of a chain does not read its predecessor's output")
        return ()


class Chain:
    """The blocks of a model with their recorded calls, and the current hidden states.

    Attributes:
        names: the blocks, in order.
        hidden: inputs of the current block, one tensor per batch.
    """

    def __init__(self, model: nn.Module, recording: Recording, numbers: Sequence[int]) -> None:
        """Start at the first block.

        Args:
            numbers: indices of the recorded batches to run.
        """
        self.names = recording.names
        self.hidden = [recording.hidden[number] for number in numbers]
        self._calls = [recording.calls[number] for number in numbers]
        self._out = recording.out
        self.refresh(model)

    def refresh(self, model: nn.Module) -> None:
        """Look the blocks up again: one that is itself a layer may have been replaced."""
        self._blocks = [module_at(model, name) for name in self.names]

    def block(self, index: int) -> nn.Module:
        return self._blocks[index]

    def run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Output hidden state of block `index` on `hidden`, differentiable."""
        call = self._calls[batch][index]
        args, kwargs = _put(call.given, call.path, hidden)
        output = self._blocks[index](*args, **kwargs)
        result = _get(output, self._out) if self._out is not None else first_tensor(output)
        if not isinstance(result, Tensor):
            raise LowrankError(f"{self.names[index]}: its output holds no hidden state")
        return result

    def outputs(self, index: int) -> list[Tensor]:
        """Outputs of block `index` on the current hidden states, without gradients."""
        block = self._blocks[index]
        with quiet(block):
            return [self.run(index, batch, hidden) for batch, hidden in enumerate(self.hidden)]


class Workbench:
    """The dense model with the batches that compression is fitted to and judged on.

    What does not depend on the compression (block inputs, the dense model's predictions) is
    computed once and shared by all candidates.

    Attributes:
        batches: those for fitting, followed by the held-out ones.
        fitted: number of batches for fitting.
        judge: the dense model's predictions on the rows that choices are judged on.
        judged_on_seen: no rows were held out, so the last fitting rows are judged on.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, rows: int = ROWS) -> None:
        """
        Args:
            rows: batch size.

        Raises:
            LowrankError: the data is a callable, which holds no rows.
        """
        if callable(calibration.batches):
            raise LowrankError("recovery runs the model on batches: pass them as data=…")
        self.model, self.calibration = model, calibration
        _, batches = followed(model, rebatched(calibration.batches, rows))
        self.fitted = len(batches)
        self.batches = batches + rebatched(calibration.held_out, rows)
        few = max(self.fitted // HELD_OUT, 1)
        self.judged_on_seen = not calibration.held_out
        self.judge = Reference(model, calibration.held_out or batches[-few:], most=KEPT_BYTES)
        self._recordings: dict[tuple[str, ...], Recording] = {}
        self._reals: dict[int, Reals] = {}

    def numbers(self, most: int | None = None) -> tuple[list[int], int]:
        """Indices of the batches to run, and how many of them, the first ones, are for fitting: at
        most `most`, None for all."""
        fitted = self.fitted if most is None else min(most, self.fitted)
        return [*range(fitted), *range(self.fitted, len(self.batches))], fitted

    def real(self, name: str, number: int) -> list[Tensor | None]:
        """Which positions of a module's inputs are no padding, call by call, when the dense model
        runs this batch; None for all, and no list if the batch has no padding."""
        if number not in self._reals:
            batch = self.batches[number]
            self._reals[number] = reals(self.model, batch) if is_padded(batch) else {}
        return self._reals[number].get(module_at(self.model, name), [])

    def dense_chain(self, names: Sequence[str], numbers: Sequence[int]) -> Chain:
        """The chain of these blocks in the dense model."""
        recording = self._recordings.setdefault(tuple(names), Recording(tuple(names)))
        self._record(self.model, recording, numbers)
        return Chain(self.model, recording, numbers)

    def chain(self, student: nn.Module, names: Sequence[str], numbers: Sequence[int]) -> Chain:
        """The same chain in a twin; call `dense_chain` first. While the twin is still dense, it
        reuses the dense model's recording."""
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
    """A copy of a nested structure with one leaf replaced."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {**value, key: _put(value[key], rest, new)}
    items = list(value)
    items[key] = _put(items[key], rest, new)
    return type(value)(items)
