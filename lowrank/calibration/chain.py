"""Chains of blocks, run one block at a time on hidden states carried from block to block.

The other inputs of a block (masks, positions, an encoder's output) are recorded in a forward pass
of the whole model. No architecture is assumed: the hidden state is the tensor that the previous
block returned. A chain of one block reads what the whole model gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import LowrankError
from ..linalg.mapped import kept
from ..walk.surgery import module_at
from .batches import ROWS, Batch, rebatched
from .running import FAILED, SameTensor, few_rows, first_tensor, forward, quiet, remade

Path = tuple[Any, ...]
Seen = Callable[[int, Tensor], None]  # a block's index and its input


class NotInBlocks(LowrankError):
    """A chain cannot be run block by block: its layers are seen to in whole passes instead."""


class _Done(Exception):
    """Ends a forward pass after the last block."""


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
        whole: rows are not independent, and no batch is cut.
        hidden: input of the first block.
        calls: the other arguments of each block.
        out: where the hidden state is in a block's output.
        ends: the last block's output, but for the hidden state.
    """

    names: tuple[str, ...]
    whole: bool = False
    hidden: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, list[_Call]] = field(default_factory=dict)
    out: Path | None = None
    ends: dict[int, Any] = field(default_factory=dict)

    def record(self, model: nn.Module, number: int, batch: Batch, seen: Seen | None = None) -> None:
        """Run the model on one batch, and record its blocks' inputs.

        Once it was seen that no block is called again later, the pass ends with the chain: what
        follows is of no use, and logits over a large vocabulary are the largest tensor of all.

        Args:
            seen: called with every hidden state: the input of each block by its index, the first
                one's last, and the output of the last block by the number of blocks.

        Raises:
            NotInBlocks: the blocks are not each called once, in the order of the chain.
        """
        few = ROWS if self.whole else few_rows(model, batch)
        first = rebatched([batch], few)[0] if not self.calls and few < ROWS else None
        if first is not None:
            self._run(model, first, None, to_the_end=True)
        calls, end = self._run(model, batch, seen, to_the_end=not self.calls and first is None)
        self._keep(number, calls)
        self.ends[number] = _put(end, self.out or (), None)
        if seen is not None:
            seen(0, self.hidden[number])
            seen(len(calls), _get(end, self.out or ()))

    def _run(
        self, model: nn.Module, batch: Batch, seen: Seen | None, *, to_the_end: bool
    ) -> tuple[list[_Call], Any]:
        """The calls of the blocks, and the output of the last one.

        The hidden state stays in the first call alone: of all blocks it would be much.
        """
        calls: list[_Call] = []
        last: list[tuple[Path, Tensor, SameTensor]] = []
        end: list[Any] = []

        def before(index: int) -> Any:
            def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
                if len(calls) != index:
                    raise NotInBlocks(f"{self.names[index]} is called out of chain order")
                given = (args, kwargs)
                path = self._link(last, given)
                if index and seen is not None:
                    seen(index, _get(given, path))
                calls.append(_Call(_put(given, path, None) if index else given, path))

            return hook

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            last[:] = [(path, tensor, SameTensor(tensor)) for path, tensor in _leaves(output)]
            end[:] = [output]
            if len(calls) == len(self.names) and not to_the_end:
                raise _Done

        with ExitStack() as stack:
            for index, name in enumerate(self.names):
                block = module_at(model, name)
                handles = (
                    block.register_forward_pre_hook(before(index), with_kwargs=True),
                    block.register_forward_hook(after),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            with suppress(_Done):
                forward(model, batch)
        if len(calls) != len(self.names):
            raise NotInBlocks(f"{len(calls)} of {len(self.names)} blocks of a chain were called")
        return calls, end[0]

    def is_plain(self, number: int) -> bool:
        """Whether the last block's output holds no tensor but the hidden state."""
        return not list(_leaves(self.ends[number]))

    def _keep(self, number: int, calls: list[_Call]) -> None:
        calls[0].path = calls[1].path if len(calls) > 1 else _first_numbers(calls[0].given)
        first = _get(calls[0].given, calls[0].path)
        if not isinstance(first, Tensor):
            raise NotInBlocks(f"{self.names[0]} is not called like the next block")
        calls[0].given = _put(calls[0].given, calls[0].path, None)
        self.hidden[number], self.calls[number] = kept(first), calls

    def _link(self, last: Sequence[tuple[Path, Tensor, SameTensor]], given: Any) -> Path:
        """Where the previous block's output is among the arguments of this one."""
        for path, tensor in _leaves(given):
            for out, _, same in last:
                if same(tensor):
                    self.out = out if self.out is None else self.out
                    return path
        if last:
            raise NotInBlocks("a block of a chain does not read its predecessor's output")
        return ()


Recordings = dict[tuple[str, ...], Recording]  # by the names of the blocks


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
        """Output hidden state of block `index` on `hidden`, differentiable.

        Raises:
            NotInBlocks: the block fails outside of the whole model, or returns no hidden state.
        """
        call = self._calls[batch][index]
        args, kwargs = _put(call.given, call.path, hidden)
        try:
            output = self._blocks[index](*args, **kwargs)
        except LowrankError:
            raise
        except FAILED as error:
            why = " ".join(str(error).split())[:120]
            raise NotInBlocks(f"{self.names[index]} fails by itself: {why}") from error
        result = _get(output, self._out) if self._out is not None else first_tensor(output)
        if not isinstance(result, Tensor):
            raise NotInBlocks(f"{self.names[index]}: its output holds no hidden state")
        return result

    def outputs(self, index: int, *, first: int = 0) -> list[Tensor]:
        """Outputs of block `index` on the current hidden states, without gradients.

        Args:
            first: number of batches to leave out, the first ones.
        """
        block, states = self._blocks[index], list(enumerate(self.hidden))[first:]
        with quiet(block):
            return [self.run(index, batch, hidden) for batch, hidden in states]


@contextmanager
def bypassed(model: nn.Module, recording: Recording, number: int, hidden: Tensor) -> Iterator[None]:
    """A context in which the chain's blocks are not run: each returns what the last one did on this
    batch, with `hidden` as the hidden state. What comes after the chain then runs alone."""
    output = _put(recording.ends[number], recording.out or (), hidden)
    blocks = [module_at(model, name) for name in recording.names]
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = lambda *_, **__: output
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            vars(block).pop("forward")
            if own is not None:
                vars(block)["forward"] = own


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))


def _first_numbers(given: Any) -> Path:
    """Where the first tensor of floating-point numbers is; nowhere if there is none."""
    return next((path for path, tensor in _leaves(given) if tensor.is_floating_point()), ())


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
    return remade(value, items)
