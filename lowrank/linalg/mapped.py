"""Large tensors in files, which the operating system pages in and out.

A statistic of every layer, or a copy of every weight, need not fit into memory: written once and
read once in the order of the layers, it may lie on the disk. Where, is said for a whole call;
outside of `in_files` everything stays in memory.
"""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

SMALL = 1 << 13  # bytes; a smaller tensor stays in memory, for a file takes whole pages
LARGE = 1 << 21  # bytes; smaller pieces are used again, which saves page faults
MOST_KEPT = 1 << 25  # what glibc raises its own limit to
M_MMAP_THRESHOLD = -3  # malloc.h
_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextmanager
def in_files(folder: str | Path | None) -> Iterator[None]:
    """A context in which `zeros` and `kept` give tensors in files of this folder; None: in memory.

    The files have no names: the space is free again once their tensors are.
    """
    token = _FOLDER.set(None if folder is None else Path(folder))
    if folder is not None:
        _give_back_from(LARGE)
    try:
        yield
    finally:
        _FOLDER.reset(token)
        if _FOLDER.get() is None:
            _give_back_from(MOST_KEPT)


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Zeros, in a file if they are large and on the CPU.

    Raises:
        OSError: the disk is full.
    """
    folder, size = _FOLDER.get(), math.prod(shape)
    if folder is None or size * dtype.itemsize < SMALL or torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="lowrank-") as file:
        # Allocated now: a full disk would else kill the process at the first write.
        _allocate(file.fileno(), size * dtype.itemsize)
        flat = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    return flat.view(shape)


def kept(tensor: Tensor) -> Tensor:
    """A copy in a file; outside of `in_files`, or of a small one, the tensor itself."""
    folder, dense = _FOLDER.get(), tensor.layout == torch.strided
    if folder is None or not dense or tensor.nbytes < SMALL or tensor.device.type != "cpu":
        return tensor
    return zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def settled(module: nn.Module) -> nn.Module:
    """The module, its large tensors now in files; what making it took is given back."""
    if _FOLDER.get() is not None:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = kept(tensor.detach())
        give_back()
    return module


def give_back() -> None:
    """Give freed memory back to the system, inside of `in_files`: glibc would keep it.

    Called after every layer and every batch: the heap would else be the larger, the longer it runs.
    """
    trim = _of_glibc("malloc_trim")
    if _FOLDER.get() is not None and trim is not None:
        trim(0)


def _give_back_from(size: int) -> None:
    """Let glibc give memory back to the system at once when it is freed, from this size on."""
    option = _of_glibc("mallopt")
    if option is not None:
        option(M_MMAP_THRESHOLD, size)


@cache
def _of_glibc(name: str) -> Callable[..., int] | None:
    found = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    return cast("Callable[..., int] | None", found)


def is_in_files() -> bool:
    """Whether large tensors live in files."""
    return _FOLDER.get() is not None


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
