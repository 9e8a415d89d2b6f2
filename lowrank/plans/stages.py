"""Seconds and peak memory of the stages of one call.

A verb opens a recording, and what it calls marks its stages. A stage inside another belongs to the
outer one, so that nothing counts twice: a candidate's refit is part of choosing ranks. Outside of a
recording a mark does nothing. The end of each is logged at the level INFO.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

from .progress import bar, one_bar

INTERVAL = 0.02  # seconds between two looks at the memory
_LOG = logging.getLogger("lowrank")
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Stage:
    """One stage of a call.

    Attributes:
        seconds: of all times that it was entered.
        peak_bytes: most memory of the process meanwhile; see `anonymous_bytes`.
    """

    name: str
    seconds: float
    peak_bytes: int


def anonymous_bytes() -> int:
    """Bytes of this process that lie in no file: mapped weights and statistics do not count.

    Where the system does not tell (no /proc), the most that was ever resident, files included.
    """
    try:
        resident, shared = _STATM.read_text().split()[1:3]
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if os.uname().sysname == "Darwin" else most * 1024
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class _Recording:
    def __init__(self) -> None:
        self.started = time.perf_counter()
        self._stages: dict[str, Stage] = {}
        self._running = ""
        self._lock = threading.Lock()

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stages.values())

    def look(self) -> None:
        with self._lock:
            known = self._stages.get(self._running)
            if known is not None:
                peak = max(known.peak_bytes, anonymous_bytes())
                self._stages[known.name] = replace(known, peak_bytes=peak)

    def watch(self, done: threading.Event) -> None:
        while not done.wait(INTERVAL):
            self.look()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._running:
            yield
            return
        started, self._running = time.perf_counter(), name
        shown = bar()
        if shown is not None:
            shown.enter(name)
        self._stages.setdefault(name, Stage(name, 0.0, 0))
        self.look()  # a stage may end before the next look
        try:
            yield
        finally:
            self.look()
            if shown is not None:
                shown.leave()
            with self._lock:
                known, self._running = self._stages[name], ""
                seconds = time.perf_counter() - started
                self._stages[name] = replace(known, seconds=known.seconds + seconds)
            _LOG.info("%s: %.1f s, memory %d MB", name, seconds, known.peak_bytes // 10**6)


_RECORDING: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording() -> Iterator[None]:
    """A context whose stages are recorded; inside of another one it is part of that.

    Meanwhile a thread of its own looks at the memory.
    """
    if _RECORDING.get() is not None:
        yield
        return
    opened, done = _Recording(), threading.Event()
    watcher = threading.Thread(target=opened.watch, args=(done,), daemon=True)
    token = _RECORDING.set(opened)
    watcher.start()
    try:
        with one_bar():
            yield
    finally:
        done.set()
        watcher.join()
        _RECORDING.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A context that is one stage of the recording; entered again, it adds to the same stage."""
    opened = _RECORDING.get()
    if opened is None:
        yield
        return
    with opened.stage(name):
        yield


def recorded() -> tuple[tuple[Stage, ...], float] | None:
    """The stages so far, in the order of their first start, and the seconds since the recording
    was opened; None outside of one."""
    opened = _RECORDING.get()
    return None if opened is None else (opened.stages, time.perf_counter() - opened.started)
