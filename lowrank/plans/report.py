"""The result of a plan: a frozen Report, printable, to and from JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import LowrankError
from ..tables import aligned, rich_table
from .entry import COLUMNS, relative
from .gains import FIELDS as GAIN
from .gains import Gain
from .plan import FORMAT, Plan, parsed
from .schema import Checks, is_integer, is_number, is_text, require_fields
from .stages import Stage, recorded

MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """The result for one site.

    Errors are squared and absolute, in `norm`: planned (from the curve), predicted (from the
    statistics that the factors were made of) and measured (from the stored factors).

    Attributes:
        total: error of the zero matrix on those statistics.
        reason: why the site stayed dense after all, or "".
    """

    name: str
    norm: str
    planned: float | None
    predicted: float | None
    measured: float | None
    total: float | None
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """A plan together with the measurements of its application.

    Attributes:
        sites: the result for each site that the plan factors.
        achieved: ratio of the targets, in the unit asked for, counted on stored tensors.
        achieved_of_model: the same of the whole model.
        bytes_before, bytes_after: of all parameters of the model, and of the index tensors of
            factored layers.
        seconds: of the whole call, calibration included.
        tokens: calibration tokens; 0 if the model was never run.
        notes: further remarks, one sentence each.
        stages: in order of execution; empty if none were recorded.
        gains: of the stages of recovery; empty without one, or where nothing could be judged.
    """

    plan: Plan
    sites: tuple[Measured, ...]
    achieved: float
    achieved_of_model: float
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    seconds: float
    tokens: int
    seed: int
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    gains: tuple[Gain, ...] = ()

    @property
    def asked(self) -> float | None:
        """The ratio that was asked for; None if ranks were."""
        return self.plan.asked.get("ratio")

    def rows(self) -> list[dict[str, str]]:
        """One row per site, as text: its plan and its measured error."""
        measured = {site.name: site for site in self.sites}
        rows = []
        for entry in self.plan.entries:
            site = measured.get(entry.name)
            if site is not None and site.reason:
                entry = entry.left_dense(site.reason)
            row = {**entry.row(), "measured": ""}
            if site is not None:
                row["measured"] = relative(site.measured, site.total)
            rows.append({column: row[column] for column in (*COLUMNS[:-1], "measured", "reason")})
        return rows

    def to_pandas(self) -> Any:
        """A DataFrame with a row per site: its plan, its size in numbers, and its errors.

        Raises:
            LowrankError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise LowrankError("to_pandas needs pandas: pip install pandas") from error
        measured = {site.name: site for site in self.sites}
        rows = []
        for entry in self.plan.entries:
            site = measured.get(entry.name)
            left = site is not None and bool(site.reason)
            stored = entry.dense if left else entry.cost
            rows.append(
                {
                    "site": entry.title,
                    "outputs": entry.shape[0],
                    "inputs": entry.shape[1],
                    "method": "dense" if left else entry.method,
                    "storage": "dense" if left else entry.storage,
                    "size": None if left else entry.size,
                    "params": stored.params,
                    "dense params": entry.dense.params,
                    "planned error": None if site is None else site.planned,
                    "measured error": None if site is None else site.measured,
                    "zero's error": None if site is None else site.total,
                    "reason": site.reason if site is not None and left else entry.reason,
                }
            )
        return DataFrame(rows)

    def times(self) -> list[dict[str, str]]:
        """One row per stage, as text: seconds, and the peak of memory that lies in no file."""
        return [
            {
                "stage": stage.name,
                "seconds": f"{stage.seconds:.1f}",
                "peak memory": f"{stage.peak_bytes / MIB:.0f} MiB",
            }
            for stage in self.stages
        ]

    def worth(self) -> list[dict[str, str]]:
        """One row per stage of recovery, as text: the measure before and after it, and by how much
        it fell a minute."""
        return [gain.row() for gain in self.gains]

    def updated(self) -> Report:
        """The report with the stages and seconds up to now, if they are being recorded."""
        so_far = recorded()
        return self if so_far is None else replace(self, stages=so_far[0], seconds=so_far[1])

    def to_json(self) -> str:
        """JSON of all figures and the plan, read back by `from_json`."""
        body = {"format": "lowrank-report", "version": FORMAT, **asdict(self)}
        body["plan"] = json.loads(self.plan.to_json())
        return json.dumps(body, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report of a JSON text; raises LowrankError with what is wrong and where."""
        body = {"stages": [], "gains": [], **parsed(text, "report")}  # older files have none
        require_fields(body, _FIELDS, "the report")
        plan = Plan.from_json(json.dumps(body["plan"]))
        for item in body["sites"]:
            require_fields(item, _SITE, "a layer of the report")
        for item in body["stages"]:
            require_fields(item, _STAGE, "a stage of the report")
        for item in body["gains"]:
            require_fields(item, GAIN, "a gain of the report")
        given = {key: body[key] for key in _FIELDS.keys() - {"format", "version"}}
        sites = tuple(Measured(**item) for item in body["sites"])
        stages = tuple(Stage(**item) for item in body["stages"])
        gained = tuple(Gain(**item) for item in body["gains"])
        made = {"plan": plan, "sites": sites, "notes": tuple(body["notes"])}
        return cls(**{**given, **made, "stages": stages, "gains": gained})

    def summary(self) -> list[str]:
        """The figures of the whole model, in a few lines."""
        factored = sum(not site.reason for site in self.sites)
        of = self.plan.asked.get("of")
        asked = "" if self.asked is None else f"asked {self.asked:g} of the {of}, "
        lines = [
            *self.plan.scope(),
            f"{asked}achieved {self.achieved:.4f} of the targets' {self.plan.unit}, "
            f"{self.achieved_of_model:.4f} of the model's",
            f"parameters {self.params_before:,} -> {self.params_after:,}, "
            f"bytes {self.bytes_before:,} -> {self.bytes_after:,}",
            f"{factored} of {len(self.plan.entries)} layers factored by "
            f"{self.plan.method}, ranks by {self.plan.settings.get('policy')}, "
            f"{self.tokens:,} calibration tokens, seed {self.seed}, {self.seconds:.1f} s",
        ]
        return [*lines, *self.notes]

    def __str__(self) -> str:
        return "\n".join([*self.summary(), *aligned(self.worth()), *aligned(self.rows())])

    def __rich__(self) -> Any:
        return rich_table("\n".join(self.summary()), self.rows())


def _is_count(value: Any) -> bool:
    return is_integer(value) and value >= 0


def _is_known(value: Any) -> bool:
    return value is not None and is_number(value)


_NUMBER = (is_number, "a number >= 0 or null")
_KNOWN = (_is_known, "a number >= 0")
_COUNT = (_is_count, "an integer >= 0")
_SITE: Checks = {
    "name": (is_text, "text"),
    "norm": (is_text, "text"),
    "planned": _NUMBER,
    "predicted": _NUMBER,
    "measured": _NUMBER,
    "total": _NUMBER,
    "seconds": _KNOWN,
    "reason": (is_text, "text"),
}
_STAGE: Checks = {"name": (is_text, "text"), "seconds": _KNOWN, "peak_bytes": _COUNT}
_FIELDS: Checks = {
    "format": (is_text, "text"),
    "version": (is_integer, "an integer"),
    "plan": (lambda v: isinstance(v, dict), "an object"),
    "sites": (lambda v: isinstance(v, list), "a list"),
    "achieved": _KNOWN,
    "achieved_of_model": (lambda v: isinstance(v, int | float), "a number"),
    "params_before": _COUNT,
    "params_after": _COUNT,
    "bytes_before": _COUNT,
    "bytes_after": _COUNT,
    "seconds": _KNOWN,
    "tokens": _COUNT,
    "seed": (is_integer, "an integer"),
    "versions": (lambda v: isinstance(v, dict), "an object"),
    "notes": (lambda v: isinstance(v, list) and all(map(is_text, v)), "a list of texts"),
    "stages": (lambda v: isinstance(v, list), "a list"),
    "gains": (lambda v: isinstance(v, list), "a list"),
}
