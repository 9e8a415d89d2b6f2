"""What was decided and what came of it: Plan and Report, frozen, printable, JSON in and out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from .errors import LowrankError, listed
from .tables import aligned, rich_table
from .types import Cost, Option, Size, Unit

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One site (or group) and what becomes of it.

    Attributes:
        sites: every name of the weight, the first one leading.
        shape: (out, in) of the dense weight.
        dense: cost of the dense weight.
        option: the chosen form; its `error` is the planned one (None once edited by hand).
        total: error of the zero matrix, in `norm`; None where no curve was made.
        target: whether the site counts among the targets of the ratio.
        rcond: smallest over largest singular value of what was decomposed; 0 is singular.
        reason: why it stays dense, or "".
    """

    sites: tuple[str, ...]
    shape: tuple[int, int]
    dense: Cost
    method: str
    size: Size | None
    storage: str
    cost: Cost
    error: float | None
    total: float | None
    norm: str
    target: bool
    rcond: float | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        return self.sites[0]

    def option(self) -> Option:
        return Option(self.method, self.size, self.storage, self.cost, self.error or 0.0)


@dataclass(frozen=True)
class Plan:
    """The chosen options with their provenance; nothing has been touched yet.

    Attributes:
        entries: every site that was considered, in the model's order.
        model: cost of the whole model, dense: parameters and bytes of all its parameters.
        asked: what was asked for, such as {"ratio": 0.6, "of": "targets", "unit": "params"}.
        settings: method, policy, align, seed, tokens, versions: what is needed to repeat it.
    """

    entries: tuple[Entry, ...]
    model: Cost
    asked: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> Unit:
        return cast(Unit, self.asked.get("unit", "params"))

    def kept(self, unit: Unit | None = None) -> float:
        """Planned share kept of the targets."""
        return _share((entry for entry in self.entries if entry.target), unit or self.unit)

    def kept_of_model(self, unit: Unit | None = None) -> float:
        """Planned share kept of the whole model."""
        unit = unit or self.unit
        saved = sum(e.dense.of(unit) - e.cost.of(unit) for e in self.entries)
        return 1 - saved / max(self.model.of(unit), 1)

    def edit(self, ranks: Mapping[str, int | None]) -> Plan:
        """A new plan with other ranks; None leaves a site dense. Planned errors become unknown.

        Raises:
            LowrankError: no such site, or no such rank for its shape.
        """
        by_name = {name: entry for entry in self.entries for name in entry.sites}
        changed: dict[str, Entry] = {}
        for name, rank in ranks.items():
            if name not in by_name:
                raise LowrankError(f"no site {name!r} in the plan; there are {listed(by_name)}")
            changed[by_name[name].name] = _with_rank(by_name[name], rank, self._method())
        entries = tuple(changed.get(entry.name, entry) for entry in self.entries)
        return replace(self, entries=entries, settings={**self.settings, "edited": True})

    def _method(self) -> str:
        return str(self.settings.get("method", "svd"))

    def to_json(self) -> str:
        body = {"format": "lowrank-plan", "version": FORMAT, **asdict(self)}
        return json.dumps(body, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Raises LowrankError when the text is no plan, with what is wrong and where."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise LowrankError(f"the plan is not JSON: {error}") from error
        if not isinstance(body, dict) or body.get("format") != "lowrank-plan":
            raise LowrankError("the JSON is no lowrank plan (no 'format': 'lowrank-plan')")
        if body.get("version") != FORMAT:
            raise LowrankError(
                f"plan version {body.get('version')!r} is unknown; this library reads {FORMAT}"
            )
        try:
            entries = tuple(_entry(item) for item in body["entries"])
            return cls(entries, Cost(**body["model"]), body["asked"], body["settings"])
        except (KeyError, TypeError) as error:
            raise LowrankError(f"the plan lacks a field or has one too many: {error}") from error

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        if not Path(path).is_file():
            raise LowrankError(f"no plan at {path}")
        return cls.from_json(Path(path).read_text(encoding="utf-8"))

    def rows(self) -> list[dict[str, str]]:
        """One row a site, as text: for tables in a terminal, a page or a model card."""
        return [_row(entry) for entry in self.entries]

    def __str__(self) -> str:
        head = (
            f"plan: {self.asked_text()} -> keeps {self.kept():.4f} of the targets' {self.unit}, "
            f"{self.kept_of_model():.4f} of the model's"
        )
        return "\n".join([head, *aligned(self.rows())])

    def asked_text(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.asked.items() if v is not None) or "a plan"

    def __rich__(self) -> Any:
        return rich_table(f"plan: {self.asked_text()}", self.rows())


@dataclass(frozen=True)
class Measured:
    """What one site became.

    Errors are squared and absolute, in `norm`: planned (from the curve), predicted (on the
    statistics that the factors were taken from) and measured (from the stored factors).
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
    """A plan together with what was measured when it was applied.

    Attributes:
        achieved: share kept of the targets, in the unit asked for, counted on stored tensors.
        achieved_of_model: the same of the whole model.
        bytes_before, bytes_after: of all parameters of the model.
        tokens: calibration tokens; 0 means that the model was never run.
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

    @property
    def asked(self) -> float | None:
        return self.plan.asked.get("ratio")

    def rows(self) -> list[dict[str, str]]:
        measured = {site.name: site for site in self.sites}
        rows = []
        for entry in self.plan.entries:
            row, site = _row(entry), measured.get(entry.name)
            if site is not None:
                row["measured"] = _relative(site.measured, site.total)
                row["reason"] = site.reason or row["reason"]
            else:
                row["measured"] = ""
            rows.append({k: row[k] for k in (*_COLUMNS[:-1], "measured", "reason")})
        return rows

    def to_json(self) -> str:
        body = {**asdict(self), "plan": json.loads(self.plan.to_json())}
        return json.dumps(body, indent=1)

    def summary(self) -> list[str]:
        factored = sum(entry.size is not None for entry in self.plan.entries)
        of = self.plan.asked.get("of")
        asked = "" if self.asked is None else f"asked {self.asked:g} of the {of}, "
        lines = [
            f"{asked}achieved {self.achieved:.4f} of the targets' {self.plan.unit}, "
            f"{self.achieved_of_model:.4f} of the model's",
            f"parameters {self.params_before:,} -> {self.params_after:,}, "
            f"bytes {self.bytes_before:,} -> {self.bytes_after:,}",
            f"{factored} of {len(self.plan.entries)} layers factored by "
            f"{self.plan.settings.get('method')}, ranks by {self.plan.settings.get('policy')}, "
            f"{self.tokens:,} calibration tokens, seed {self.seed}, {self.seconds:.1f} s",
        ]
        return [*lines, *self.notes]

    def __str__(self) -> str:
        return "\n".join([*self.summary(), *aligned(self.rows())])

    def __rich__(self) -> Any:
        return rich_table("\n".join(self.summary()), self.rows())


_COLUMNS = ("site", "shape", "method", "rank", "kept", "error", "reason")


def _row(entry: Entry) -> dict[str, str]:
    return {
        "site": entry.name or "(root)",
        "shape": f"{entry.shape[0]}x{entry.shape[1]}",
        "method": entry.method,
        "rank": "" if entry.size is None else ",".join(map(str, entry.size)),
        "kept": f"{entry.cost.params / max(entry.dense.params, 1):.3f}",
        "error": _relative(entry.error, entry.total),
        "reason": entry.reason,
    }


def _relative(error: float | None, total: float | None) -> str:
    """Share of the energy that is lost, as the square root (a relative norm)."""
    if error is None or total is None:
        return ""
    return f"{(error / total) ** 0.5 if total > 0 else 0.0:.4f}"


def _share(entries: Iterable[Entry], unit: Unit) -> float:
    every = list(entries)
    return sum(e.cost.of(unit) for e in every) / max(sum(e.dense.of(unit) for e in every), 1)


def _with_rank(entry: Entry, rank: int | None, method: str) -> Entry:
    if rank is None:
        return replace(
            entry,
            method="dense",
            size=None,
            storage="dense",
            cost=entry.dense,
            error=0.0,
            reason="left dense by hand",
        )
    check_rank(entry.name, entry.shape, rank)
    per_rank = sum(entry.shape)
    itemsize = entry.dense.bytes // max(entry.dense.params, 1)
    cost = Cost(rank * per_rank, rank * per_rank * itemsize, rank * per_rank)
    method = entry.method if entry.size is not None else method
    return replace(
        entry, method=method, size=(rank,), storage="factors", cost=cost, error=None, reason=""
    )


def check_rank(name: str, shape: Sequence[int], rank: Any) -> None:
    """Raises LowrankError unless the rank exists for this shape and makes the layer smaller."""
    out_features, in_features = shape
    even = -(-out_features * in_features // (out_features + in_features))
    integer = isinstance(rank, int) and not isinstance(rank, bool)
    if not integer or not 1 <= rank <= min(shape) or rank >= even:
        raise LowrankError(
            f"rank must be in [1, {min(shape)}] for {name or 'the root'} of shape "
            f"({out_features}, {in_features}), got {rank!r}; from {even} on a factored layer is "
            "not smaller than the dense one"
        )


def _entry(item: dict[str, Any]) -> Entry:
    body = dict(item)
    name = (body.get("sites") or ["?"])[0]
    size = body["size"]
    body["sites"] = tuple(body["sites"])
    body["shape"] = tuple(body["shape"])
    body["dense"], body["cost"] = Cost(**body["dense"]), Cost(**body["cost"])
    if size is not None:
        if not (isinstance(size, list) and all(isinstance(n, int) for n in size)):
            raise LowrankError(f"{name}: size must be a list of integers or null, got {size!r}")
        body["size"] = tuple(size)
        if len(size) == 1:
            check_rank(name, body["shape"], size[0])
    return Entry(**body)
