"""A limit of time for one piece of work, where a hang would stop a long run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class TooLong(BaseException):
    """No Exception, which the code under test may catch."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises TooLong if its body takes longer."""

    def late(*_: object) -> None:
        raise TooLong(f"over {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
