"""Several processes for one command, as torchrun and `accelerate launch` start them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import LowrankError

SHARED = ("compress", "plan", "run")  # the commands whose work is divided


@contextmanager
def joined() -> Iterator[None]:
    """A context in which the processes of a launcher form a group, over gloo, and nccl where each
    has a GPU; without a launcher, none."""
    if not _several():
        yield
        return
    import torch

    gpu = _gpu()
    if gpu is not None:
        torch.cuda.set_device(gpu)
    torch.distributed.init_process_group("gloo" if gpu is None else "cpu:gloo,cuda:nccl")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def check_shared(command: str) -> None:
    """Raises LowrankError for a command that several processes would each run alone."""
    if _several() and command not in SHARED:
        raise LowrankError(
            f"{command} runs in one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}: start it "
            f"without a launcher; only {', '.join(SHARED)} divide their work"
        )


def placed(model: Any) -> Any:
    """The model on this process's own GPU, if every process has one; else as it is."""
    gpu = _gpu() if _several() else None
    return model if gpu is None else model.to(f"cuda:{gpu}")


def number() -> str:
    """The number of this process; "" if it is the only one."""
    return os.environ["RANK"] if _several() else ""


def writes() -> bool:
    """Whether this process prints and writes: the first one."""
    return number() in ("", "0")


def _gpu() -> int | None:
    """The GPU of this process; None unless there is one for each on this machine."""
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
    return int(os.environ.get("LOCAL_RANK") or 0) if torch.cuda.device_count() >= here else None


def _several() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ
