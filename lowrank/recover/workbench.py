"""The workbench: a dense model with the batches that its compression is fitted to and judged on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..calibration.batches import ROWS, is_padded, regrouped
from ..calibration.chain import Chain, Recording, Recordings
from ..calibration.padding import Reals, reals
from ..calibration.running import quiet
from ..calibration.statistics import Calibration, fewer, followed
from ..errors import LowrankError
from ..measure.eval import Reference
from ..walk.surgery import factored, module_at
from .journal import Journal

HELD_OUT = 8  # without held-out rows, one batch in this many serves to judge
KEPT_BYTES = 1 << 28  # cache of the dense model's logits on those rows


class Workbench:
    """The dense model with the batches that compression is fitted to and judged on.

    What does not depend on the compression (block inputs, the dense model's predictions) is
    computed once and shared by all candidates.

    Attributes:
        batches: those for fitting, followed by the held-out ones.
        fitted: number of batches for fitting.
        judge: the dense model's predictions on the rows that choices are judged on.
        judged_on_seen: no rows were held out, so the last fitting rows are judged on.
        journal: where finished blocks are kept, if the call is to be resumable.
    """

    journal: Journal | None = None

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        rows: int = ROWS,
        recordings: Recordings | None = None,
    ) -> None:
        """
        Args:
            rows: batch size, but of batches that stay whole.
            recordings: of the fitting batches, `ROWS` rows each, if they were made already.

        Raises:
            LowrankError: the data is a callable, which holds no rows.
        """
        if callable(calibration.batches):
            raise LowrankError("recovery runs the model on batches: pass them as data=…")
        self.model, self.calibration = model, calibration
        whole = calibration.whole
        fitted, held_out = calibration.batches, list(calibration.held_out)
        if not whole:
            fitted, held_out = regrouped(fitted, rows), regrouped(held_out, rows)
        _, batches = followed(model, fitted, whole=whole)
        self.fitted = len(batches)
        self.batches = batches + held_out
        few = max(self.fitted // HELD_OUT, 1)
        self.judged_on_seen = not calibration.held_out
        held = calibration.held_out or batches[-few:]
        held = fewer(model, held, whole=whole)
        self.judge = Reference(model, held, most=KEPT_BYTES)
        self._recordings = dict(recordings or {}) if rows == ROWS else {}
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
        if len(names) == 1:  # each holds hidden states of its own: keep one such recording
            held = self._recordings.items()
            self._recordings = {k: r for k, r in held if len(k) > 1 or k == names}
        recording = self._recordings.setdefault(
            tuple(names), Recording(tuple(names), self.calibration.whole)
        )
        self._record(self.model, recording, numbers)
        return Chain(self.model, recording, numbers)

    def chain(self, student: nn.Module, names: Sequence[str], numbers: Sequence[int]) -> Chain:
        """The same chain in a twin; call `dense_chain` first. While the twin is still dense, it
        reuses the dense model's recording."""
        if not factored(student):
            return Chain(student, self._recordings[tuple(names)], numbers)
        recording = Recording(tuple(names), self.calibration.whole)
        self._record(student, recording, numbers)
        return Chain(student, recording, numbers)

    def _record(self, model: nn.Module, recording: Recording, numbers: Sequence[int]) -> None:
        with quiet(model):
            for number in numbers:
                if number not in recording.calls:
                    recording.record(model, number, self.batches[number])
