"""Several processes: each runs its share of the batches, and all go on with the same results.

Whoever started them (torchrun, accelerate) has initialised torch.distributed; with one process, and
without a group, every function gives back what it was given. All processes call these functions in
the same order, and none of them within the work of `in_step` or `dealt`: an error on one process is
then raised on all, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from io import BytesIO
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import LowrankError

T = TypeVar("T")
# Their forward passes wait for those of the other processes, which have other batches.
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """A context in which this process works by itself, whatever the others do meanwhile."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world() -> int:
    """How many processes work together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    there = there and not _ALONE.get()
    return torch.distributed.get_world_size() if there else 1


def rank() -> int:
    """The number of this process, from 0."""
    return torch.distributed.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def mine(items: Iterable[T]) -> list[T]:
    """This process's share: every `world`-th item, from its own number on."""
    return list(items)[rank() :: world()]


def gathered(value: T) -> list[T]:
    """The value of every process, by number; tensors on a GPU come to this process's own."""
    return [value] if world() == 1 else _exchanged(value, _packed(value))


def agreed(value: T) -> T:
    """The value of process 0."""
    return gathered(value if is_main() else None)[0]  # type: ignore[return-value]


class _Failed(NamedTuple):
    """Why a process could not do its work."""

    error: LowrankError


def in_step(work: Callable[[], T]) -> list[T]:
    """Do this process's work; the results of all processes, by number.

    Raises:
        LowrankError: that of the first process that failed; on every process.
    """
    if world() == 1:
        return [work()]
    done: Any
    try:
        done = work()
        packed = _packed(done)  # what cannot be sent is an error of all, too
    except LowrankError as error:
        done = _Failed(error)
        packed = _packed(done)
    except Exception as error:  # another library's may not survive the way to the others
        gathered(_Failed(LowrankError(f"process {rank()}: {type(error).__name__}: {error}")))
        raise
    results = _exchanged(done, packed)
    for result in results:
        if isinstance(result, _Failed):
            raise result.error
    return results


def dealt(works: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of works that do not depend on each other, in order; each is done by one process
    and given to all, a round of as many as there are processes at a time.

    Raises:
        LowrankError: as `in_step`.
    """
    if world() == 1:
        yield from (work() for work in works)
        return
    left = iter(works)
    while turn := list(islice(left, world())):
        own = mine(turn)
        for result in in_step(lambda own=own: [work() for work in own]):  # type: ignore[misc]
            yield from result


def summed(*tensors: Tensor) -> None:
    """Add up each float64 tensor over all processes, in place; all hold the same bits."""
    if world() > 1:
        for tensor in tensors:
            assert tensor.dtype == torch.float64
            _through(tensor, torch.distributed.all_reduce)


@torch.no_grad()
def from_first(tensors: Iterable[Tensor]) -> None:
    """Give each tensor the values that it has in process 0, in place."""
    if world() > 1:
        for tensor in tensors:
            _through(tensor.detach(), lambda t: torch.distributed.broadcast(t, src=0))


def check_same(**said: object) -> None:
    """Check that all processes were given the same.

    Args:
        said: by what it is called, its digest or what it prints.

    Raises:
        LowrankError: they were not; on every process.
    """
    first, *others = gathered({name: str(value) for name, value in said.items()})
    for number, other in enumerate(others, 1):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise LowrankError(
                    f"{name} differs between the processes ({first.get(name)!s:.60} on process 0, "
                    f"{other.get(name)!s:.60} on process {number}): give every process the same "
                    "model, data and options, and it takes its own share"
                )


def check_unwrapped(model: nn.Module) -> None:
    """Raises LowrankError for a wrapper whose forward passes wait for other processes."""
    if world() == 1:
        return
    for module in model.modules():
        names = [cls.__name__ for cls in type(module).__mro__ if cls.__name__ in WRAPPERS]
        if names:
            raise LowrankError(
                f"the model is wrapped in {names[0]}, which cannot run other batches on every "
                "process: pass the model inside, whole on each"
            )


def _through(tensor: Tensor, collective: Callable[[Tensor], Any]) -> None:
    """Run a collective in place, on a device that the group's backend can reach."""
    backends = torch.distributed.get_backend_config()
    place = tensor.device
    if f"{place.type}:" not in backends:
        place = torch.device("cuda" if "cuda:" in backends else "cpu")
    moved = tensor.to(place).contiguous()
    collective(moved)
    if moved is not tensor:
        tensor.copy_(moved)


def _exchanged(value: Any, packed: bytes) -> list[Any]:
    """The values of all processes, this one's as it is."""
    parts = [b""] * world()
    torch.distributed.all_gather_object(parts, packed)
    return [value if i == rank() else _unpacked(part) for i, part in enumerate(parts)]


def _packed(value: Any) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Any:
    def place(storage: Any, location: str) -> Any:
        return storage.cuda() if location.startswith("cuda") else storage

    return torch.load(BytesIO(packed), map_location=place, weights_only=False)
