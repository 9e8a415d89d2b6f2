"""The time that a recovery may take: what is left of it, its shares, and training that keeps to it.

The closed form runs whole. What it leaves is divided among the blocks that are still to be trained
and distillation as their default steps are, for one step of all blocks takes about as long as one
step of distillation; what a stage does not use falls to those after it. Training is timed while it
runs, and its number of steps, and with it the schedule of its rate, follows. The schedule is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..calibration.processes import agreed
from .recovery import Recovery
from .training import Loss, Trained, Training, fit

TIMED = 4  # steps before their number is set; the first is not timed, since it fills caches
SPARE = 0.03  # share of the time for what comes after training: judging, errors, writing


clock: Callable[[], float] = time.perf_counter


def now() -> float:
    """Seconds of `clock`, which never goes back."""
    return clock()


class Budget:
    """The time of one call, and what is left of it.

    Attributes:
        training: seconds for which blocks were trained, by an earlier call that was killed too.
    """

    def __init__(self, recovery: Recovery, blocks: int, spent: float) -> None:
        """
        Args:
            blocks: number of blocks that the call trains.
            spent: seconds that the call has taken up to now.
        """
        self.training = 0.0
        self._recovery, self._spent, self._earlier = recovery, spent, 0.0
        self._blocks = self._waiting = blocks
        self._started, self._trained = now(), 0.0
        self._done = self._short = 0
        self._undistilled = False

    def since_start(self) -> float:
        """Seconds of recovery in this call."""
        return now() - self._started

    def state(self) -> dict[str, float]:
        """What `restored` needs to know once this call was killed."""
        return {"elapsed": self._elapsed(), "training": self.training}

    def restored(self, state: Mapping[str, float]) -> None:
        """The next block was finished by an earlier call, whose state it was."""
        self._earlier, self.training = state["elapsed"], state["training"]
        self._waiting -= 1

    def of_block(self) -> float | None:
        """Seconds for training the next block, whose layers are refitted; None for no limit."""
        self._waiting, self._done = max(self._waiting - 1, 0), self._done + 1
        if self._recovery.minutes is None:
            return None
        closed = (self.since_start() - self._trained) / self._done * self._waiting
        mine, steps = self._recovery.block_steps, self._recovery.distill_steps * self._blocks
        share = mine / (mine * (self._waiting + 1) + steps)
        seconds = agreed(max(self._left() - closed, 0.0) * share)
        self._short += seconds == 0
        return seconds

    def trained(self, seconds: float) -> None:
        """A block was trained for so long."""
        self._trained += seconds
        self.training += seconds

    def of_distillation(self) -> float | None:
        """Seconds for distillation, which is the last; None for no limit."""
        if self._recovery.minutes is None:
            return None
        seconds = agreed(max(self._left(), 0.0))
        self._undistilled = seconds == 0
        return seconds

    def notes(self) -> list[str]:
        """What there was no time for, in a sentence for the report."""
        minutes = self._recovery.minutes
        if not self._short and not self._undistilled:
            return []
        if not self.training and (self._undistilled or not self._recovery.distill_steps):
            return [
                f"{minutes:g} minutes were too few for the closed form, which always runs whole: "
                "nothing was trained"
            ]
        parts = [f"{self._short} blocks"] * bool(self._short)
        parts += ["distillation"] * self._undistilled
        return [f"no time of {minutes:g} minutes was left for {' and '.join(parts)}"]

    def _elapsed(self) -> float:
        """Seconds of this call, and of an earlier one that was killed up to its last block."""
        return self._earlier + self._spent + self.since_start()

    def _left(self) -> float:
        return 60 * (self._recovery.minutes or 0.0) * (1 - SPARE) - self._elapsed()


@dataclass
class Pace:
    """Sets the number of steps of a training run by the time that they take.

    Attributes:
        end: when to end, by `now`.
        usual: number of steps, unless fewer than twice as many fit.
        ample: whether more time is left than the usual number takes.
    """

    end: float
    usual: int
    ample: bool = False
    _first: float = 0.0
    _next: int = TIMED  # step after which the number is set again

    def __call__(self, step: int, steps: int) -> int:
        """The number of steps in all, after this one."""
        if step == 1:
            self._first = now()
        if now() >= self.end:
            return step
        if step < self._next:
            return max(steps, self._next)
        each = max((now() - self._first) / (step - 1), 1e-9)
        left = int((self.end - now()) / each)
        if step == TIMED:
            self.ample = step + left >= 2 * self.usual
        steps = min(step + left, max(self.usual, step) if self.ample else 2 * self.usual)
        self._next = step + max((steps - step) // 4, 1)
        return steps


def fit_within(
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    batches: Sequence[int],
    held_out: Sequence[int],
    options: Training,
    seconds: float | None,
    known: float | None = None,
) -> Trained:
    """`fit` in the time that there is, which sets the number of steps.

    Where that is far more than the usual steps take, runs of twice as many follow, as long as each
    lowers the held-out loss and is still lowering it in its second half.

    Args:
        options: `steps` is the usual number.
        seconds: None for no limit, and exactly the usual steps.
        known: as for `fit`.

    Raises:
        LowrankError: as `fit`.
    """
    if seconds is None:
        return fit(parameters, loss, batches, held_out, options, known=known)
    end, runs = now() + seconds, list[Trained]()
    while True:
        pace, known = Pace(end, options.steps), runs[-1].after if runs else known
        runs.append(fit(parameters, loss, batches, held_out, options, pace=pace, known=known))
        last = runs[-1]
        if not pace.ample or 2 * last.best_step < last.steps or now() >= end:
            return agreed(_in_all(runs))
        options = replace(options, steps=2 * options.steps, seed=options.seed + 1)


def _in_all(runs: Sequence[Trained]) -> Trained:
    """Runs of which each began where the one before ended, as one."""
    done, best_step = 0, 0
    for run in runs:
        best_step = done + run.best_step if run.kept else best_step
        done += run.steps
    return Trained(runs[0].before, runs[-1].after, best_step, done)
