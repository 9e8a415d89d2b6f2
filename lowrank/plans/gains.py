"""What each stage of recovery gained for its time."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace

from .schema import Checks, is_integer, is_number, is_text

_LOG = logging.getLogger("lowrank")
WHOLE = 1 / 60  # minutes: what took less gains no rate


@dataclass(frozen=True)
class Gain:
    """One stage of recovery: what it lowered, and the time that it took.

    Attributes:
        stage: its name.
        measure: what `before` and `after` are, on held-out rows: the KL of the model or its
            relative squared error, or the error of the blocks' outputs.
        before, after: the measure; smaller is better.
        seconds: time of the stage, judging excluded.
        steps: gradient steps that it took.
    """

    stage: str
    measure: str
    before: float
    after: float
    seconds: float
    steps: int = 0

    @property
    def per_minute(self) -> float:
        """By how much the measure fell per minute; that of at least a second."""
        return (self.before - self.after) / max(self.seconds / 60, WHOLE)

    def row(self) -> dict[str, str]:
        """The stage as text, for tables."""
        return {
            "stage": self.stage,
            "measure": self.measure,
            "before": f"{self.before:.4g}",
            "after": f"{self.after:.4g}",
            "steps": f"{self.steps:,}" if self.steps else "",
            "minutes": f"{self.seconds / 60:.2f}",
            "gained a minute": f"{self.per_minute:.3g}",
        }

    def __str__(self) -> str:
        return (
            f"{self.stage}: {self.measure} {self.before:.4g} -> {self.after:.4g} in "
            f"{self.seconds / 60:.2f} minutes, {self.per_minute:.3g} a minute"
        )


@dataclass
class Course:
    """The stages that a recovery went through, and the measure between them as far as it is known.

    Attributes:
        measure: of the held-out rows.
    """

    measure: str = ""
    _stages: list[Gain] = field(default_factory=list)

    @property
    def unjudged(self) -> bool:
        """Whether a stage has passed since the measure was last known."""
        return bool(self._stages) and math.isnan(self._stages[-1].after)

    def passed(self, stage: str, seconds: float, steps: int = 0) -> None:
        """A stage is over, and nothing was judged since."""
        self._stages.append(Gain(stage, "", math.nan, math.nan, seconds, steps))

    def judged(self, value: float) -> None:
        """The measure after the last stage."""
        if self._stages:
            self._stages[-1] = replace(self._stages[-1], after=value)

    def gains(self, before: float, after: float, *parts: Gain) -> tuple[Gain, ...]:
        """The gain of every stage, each logged at the level INFO.

        Args:
            before, after: the measure before the first stage and after the last.
            parts: gains of parts of the first stage, in measures of their own.
        """
        self.judged(after)
        found = []
        for stage in self._stages:
            found.append(replace(stage, measure=self.measure, before=before))
            before = stage.after
        found[1:1] = parts
        known = tuple(g for g in found if math.isfinite(g.before) and math.isfinite(g.after))
        for gain in known:
            _LOG.info("%s", gain)
        return known


_KNOWN = (lambda v: v is not None and is_number(v), "a number >= 0")
FIELDS: Checks = {
    "stage": (is_text, "text"),
    "measure": (is_text, "text"),
    "before": _KNOWN,
    "after": _KNOWN,
    "seconds": _KNOWN,
    "steps": (lambda v: is_integer(v) and v >= 0, "an integer >= 0"),
}
