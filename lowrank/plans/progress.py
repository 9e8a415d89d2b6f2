"""One progress bar for a call: its stage, the step in it, and the remaining time.

A verb says which stages are to come (`expect`), stages.py which one it is, and whoever runs in
steps counts them. Each stage takes a share of the bar, and the remaining time follows from those
that are over. Outside of a call whose stages are expected, `steps` shows a bar of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
# How long the stages take beside each other: roughly what benchmarks/real_llm.py prints for "fast";
# of distillation and batch norms a guess.
SHARES: Mapping[str, float] = {
    "loading": 1.0,
    "calibration": 45.0,
    "gradients": 110.0,
    "decompositions": 15.0,
    "choosing ranks": 65.0,
    "factoring": 25.0,
    "refit by block": 130.0,
    "batch norms": 10.0,
    "distillation": 1000.0,
    "judging": 10.0,
    "measuring errors": 5.0,
    "writing": 2.0,
}
SHOWN = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
DELAY = 2.0  # seconds before a bar appears


class _Bar:
    """The bar of one call."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.shares = {name: SHARES.get(name, 1.0) for name in stages}
        self.counting = False  # steps inside of steps do not count
        self._done: dict[str, float] = {}
        self._stage = ""
        # The average since the start: a stage is faster than the next by its nature.
        self._tqdm = _tqdm(
            total=sum(self.shares.values()), bar_format=SHOWN, delay=DELAY, leave=False, smoothing=0
        )

    def enter(self, stage: str) -> None:
        self._stage = stage
        self._tqdm.set_description_str(stage, refresh=False)
        self.at(self._done.get(stage, 0.0), "")

    def leave(self) -> None:
        self.at(1.0, "")
        self._stage = ""

    def at(self, part: float, step: str) -> None:
        """The running stage has come to this part of it, in [0, 1]; it never falls."""
        if self._stage not in self.shares:
            return
        self._done[self._stage] = max(part, self._done.get(self._stage, 0.0))
        text = f"{self._stage}: {step}" if step else self._stage
        self._tqdm.set_description_str(text, refresh=False)
        now = sum(self.shares[stage] * share for stage, share in self._done.items())
        self._tqdm.update(now - self._tqdm.n)

    def close(self) -> None:
        self._tqdm.close()


_OPENED: ContextVar[list[_Bar] | None] = ContextVar("bar", default=None)


@contextmanager
def one_bar() -> Iterator[None]:
    """A context of one call, in which `expect` opens a bar; inside another one, nothing."""
    if _OPENED.get() is not None:
        yield
        return
    bars: list[_Bar] = []
    token = _OPENED.set(bars)
    try:
        yield
    finally:
        _OPENED.reset(token)
        for bar in bars:
            bar.close()


def expect(stages: Sequence[str]) -> None:
    """Show one bar for these stages from now on; those of an earlier call hold."""
    bars = _OPENED.get()
    if bars is not None and not bars:
        bars.append(_Bar(stages))


def bar() -> _Bar | None:
    """The bar of the call, if one was expected."""
    bars = _OPENED.get()
    return bars[0] if bars else None


def steps(items: Sequence[T], what: str, shown: bool) -> Iterator[T]:
    """The items, counted on the bar of the call or on one of their own.

    Args:
        what: one of them, such as "block".
        shown: whether a bar of their own may appear.
    """
    counter = Steps(len(items), what, shown)
    with counter:
        for item in items:
            yield item
            counter.update()


class Steps:
    """Steps of a stage, counted by `update`.

    Attributes:
        upto: the part of the stage that they are, from its start.
    """

    def __init__(self, total: int, what: str, shown: bool, *, upto: float = 1.0) -> None:
        self.total, self.what, self.upto, self.done = total, what, upto, 0
        shared = bar()
        self._shared = None if shared is None or shared.counting else shared
        self._own: Any = None
        if self._shared is not None:
            self._shared.counting = True
        if shared is None:
            self._own = _tqdm(total=total, desc=what, delay=DELAY, leave=False, disable=not shown)

    def update(self, count: int = 1) -> None:
        self.done += count
        if self._own is not None:
            self._own.update(count)
        elif self._shared is not None:
            text = f"{self.what} {self.done:,} of {self.total:,}"
            part = min(self.done / max(self.total, 1), 1.0)
            self._shared.at(part * self.upto, text)

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own.close()
        if self._shared is not None:
            self._shared.counting = False


def _tqdm(**options: Any) -> Any:
    from tqdm.auto import tqdm

    return tqdm(**options)
