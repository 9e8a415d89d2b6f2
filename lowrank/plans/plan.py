"""The decision before anything is changed: a frozen Plan, printable, to and from JSON."""

from __future__ import annotations

import importlib
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..errors import LowrankError, listed
from ..nn import form_of
from ..nn.form import SIZES_OF_KIND
from ..tables import aligned, rich_table
from ..types import UNITS, Cost, Site, Size, Unit
from ..walk import coverage, layouts
from ..walk.surgery import factored
from . import shared_basis
from .entry import Entry
from .schema import (
    COST,
    Checks,
    are_parts,
    is_cost,
    is_counts,
    is_integer,
    is_number,
    is_text,
    require_fields,
)

FORMAT = 1
Work = list[tuple[Site, Entry]]


@dataclass(frozen=True)
class Plan:
    """The chosen options with their provenance; the model is not changed yet.

    Attributes:
        entries: every site that was considered, in the model's order.
        model: cost of the whole dense model: parameters and bytes of all its parameters.
        asked: the request, such as {"ratio": 0.6, "of": "targets", "unit": "params"}.
        settings: what reproduces it: method, policy, align, seed, tokens, data (if the model
            wrote it), versions.
    """

    entries: tuple[Entry, ...]
    model: Cost
    asked: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> Unit:
        """Unit of the ratio."""
        return cast(Unit, self.asked.get("unit") or "params")

    @property
    def method(self) -> str:
        """Default method of the plan's sites."""
        return str(self.settings.get("method") or "svd")

    @property
    def storage(self) -> str:
        """Default storage of the plan's linear layers."""
        return str(self.settings.get("storage") or "factors")

    @property
    def single(self) -> str:
        """Default method of the plan's sites that share no basis."""
        return str(self.settings.get("alone") or self.method)

    @property
    def seed(self) -> int:
        """Random seed (default 0)."""
        return int(self.settings.get("seed") or 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks about layers that stay dense against the request, one sentence each."""
        return tuple(self.settings.get("notes") or ())

    def kept(self, unit: Unit | None = None) -> float:
        """Planned ratio of the targets."""
        return _share((entry for entry in self.entries if entry.target), unit or self.unit)

    def kept_of_model(self, unit: Unit | None = None) -> float:
        """Planned ratio of the whole model."""
        unit = unit or self.unit
        saved = sum(e.dense.of(unit) - e.cost.of(unit) for e in self.entries)
        return 1 - saved / max(self.model.of(unit), 1)

    def edit(self, ranks: Mapping[str, int | Size | None]) -> Plan:
        """A new plan with other ranks; None leaves a site dense. Planned errors become unknown.

        Forms that are sized by several numbers take a tuple of them.

        Sites that share one basis change together: naming one of them is enough.

        Raises:
            LowrankError: unknown site, invalid rank for its shape, or two ranks for one basis.
        """
        by_name = {name: entry for entry in self.entries for name in entry.sites}
        changed: dict[str, Entry] = {}
        for name, rank in ranks.items():
            if name not in by_name:
                raise LowrankError(f"no site {name!r} in the plan; it has {listed(by_name, 4)}")
            defaults = (self.single, self.storage)
            for entry in shared_basis.edited(by_name[name], self.entries, rank, *defaults):
                if changed.setdefault(entry.name, entry) != entry:
                    raise LowrankError(
                        f"conflicting ranks for {entry.title}: {listed(ranks)} share one basis or "
                        "one weight"
                    )
        entries = tuple(changed.get(entry.name, entry) for entry in self.entries)
        return replace(self, entries=entries, settings={**self.settings, "edited": True})

    def to_json(self) -> str:
        """Editable JSON, read back by `from_json`."""
        body = {"format": "lowrank-plan", "version": FORMAT, **asdict(self)}
        return json.dumps(body, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of a JSON text, which may have been edited: costs are recomputed from sizes.

        Raises LowrankError if the text is not a valid plan, with what is wrong and where.
        """
        body = parsed(text, "plan")
        require_fields(body, _FIELDS, "the plan")
        for part, checks in (("asked", _ASKED), ("settings", _SETTINGS)):
            known = {key: body[part].get(key) for key in checks}
            require_fields(known, checks, f"{part!r} in the plan")
        plan = cls((), Cost(**body["model"]), body["asked"], body["settings"])
        entries = tuple(
            Entry.from_json(item, plan.single, plan.storage) for item in body["entries"]
        )
        names = Counter(name for entry in entries for name in entry.sites)
        repeated = [name for name, times in names.items() if times > 1]
        if repeated:
            raise LowrankError(f"{listed(repeated)}: in more than one entry of the plan")
        return replace(plan, entries=shared_basis.consistent(entries))

    def save(self, path: str | Path) -> None:
        """Write the JSON to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan; raises LowrankError as `from_json` does, or if there is no file."""
        if not Path(path).is_file():
            raise LowrankError(f"no plan at {path}")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LowrankError(f"{path} is not JSON, which is UTF-8 text: {error}") from error
        return cls.from_json(text)

    def rows(self) -> list[dict[str, str]]:
        """One row per site, as text: for tables in a terminal, a page or a model card."""
        return [entry.row() for entry in self.entries]

    def asked_text(self) -> str:
        """The request, in a few words."""
        return ", ".join(f"{k} {v}" for k, v in self.asked.items() if v is not None) or "a plan"

    def scope(self) -> list[str]:
        """What the plan is about, and what it leaves out, in a line or two."""
        targets = sum(entry.dense.params for entry in self.entries if entry.target)
        outside = coverage.told(self.settings.get("uncovered") or {})
        lines = [f"targets: {targets:,} of {self.model.params:,} parameters"]
        return [*lines, outside] if outside else lines

    def __str__(self) -> str:
        head = (
            f"plan: {self.asked_text()} -> keeps {self.kept():.4f} of the targets' {self.unit}, "
            f"{self.kept_of_model():.4f} of the model's"
        )
        return "\n".join([*self.scope(), head, *self.notes, *aligned(self.rows())])

    def __rich__(self) -> Any:
        head = [*self.scope(), f"plan: {self.asked_text()}", *self.notes]
        return rich_table("\n".join(head), self.rows())


def parsed(text: str, what: str) -> dict[str, Any]:
    """The JSON object of a stored plan or report.

    Raises:
        LowrankError: it is something else, or of an unknown version.
    """
    try:
        body = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise LowrankError(f"the {what} is not JSON: {error}") from error
    if not isinstance(body, dict) or body.get("format") != f"lowrank-{what}":
        raise LowrankError(f"this JSON is not a lowrank {what} (no 'format': 'lowrank-{what}')")
    if body.get("version") != FORMAT:
        raise LowrankError(
            f"{what} version {body.get('version')!r} is unknown; this library reads {FORMAT}"
        )
    return body


def _share(entries: Iterable[Entry], unit: Unit) -> float:
    every = list(entries)
    return sum(e.cost.of(unit) for e in every) / max(sum(e.dense.of(unit) for e in every), 1)


_FIELDS: Checks = {
    "format": (is_text, "text"),
    "version": (is_integer, "an integer"),
    "entries": (lambda v: isinstance(v, list), "a list"),
    "model": (is_cost, COST),
    "asked": (lambda v: isinstance(v, dict), "an object"),
    "settings": (lambda v: isinstance(v, dict), "an object"),
}
_ASKED: Checks = {
    "ratio": (is_number, "a number or null"),
    "unit": (lambda v: v is None or v in UNITS, f"one of {', '.join(UNITS)}"),
}
_SETTINGS: Checks = {
    "method": (lambda v: v is None or is_text(v), "text"),
    "alone": (lambda v: v is None or is_text(v), "text"),
    "seed": (lambda v: v is None or is_integer(v), "an integer"),
    "storage": (
        lambda v: v is None or any(form_of(v, kind) for kind in SIZES_OF_KIND),
        "a storage of a registered form",
    ),
    "data": (lambda v: v is None or is_text(v), "text"),
    "recovery": (lambda v: v is None or isinstance(v, dict), "an object or null"),
    "notes": (
        lambda v: v is None or (isinstance(v, list) and all(map(is_text, v))),
        "a list of texts",
    ),
    "uncovered": (is_counts, "an object of counts"),
    "parts": (are_parts, "an object of lists of outputs"),
}


def matched(sites: Sequence[Site], plan: Plan, model: nn.Module) -> Work:
    """The sites that the plan factors, with their entries.

    Raises:
        LowrankError: the plan was made for another model, or a site cannot be factored now.
    """
    if any(entry.group for entry in plan.entries):
        shared_basis.consistent(plan.entries)
    by_name = {name: site for site in sites for name in site.names}
    for entry in plan.entries:
        _check_same(entry, by_name, model)
    missing = sorted(by_name.keys() - {name for entry in plan.entries for name in entry.sites})
    if missing:
        raise LowrankError(
            f"the plan has no entry for {listed(missing, 4)}: it was made for another model, or "
            "entries were removed (size null leaves a layer dense)"
        )
    work = [(by_name[entry.name], entry) for entry in plan.entries if entry.size is not None]
    for site, _ in work:
        if site.reason:
            raise LowrankError(f"{site.title} cannot be factored: {site.reason}")
        if not layouts.is_finite(site.module):
            raise LowrankError(f"{site.title}: the weight holds NaN or Inf")
    return work


def _check_same(entry: Entry, by_name: Mapping[str, Site], model: nn.Module) -> None:
    """Raises LowrankError unless the model has the layer of this entry."""
    site = by_name.get(entry.name)
    if site is None and entry.name in factored(model):
        raise LowrankError(f"{entry.title} is factored already: apply the plan to the dense model")
    if site is None:
        raise LowrankError(
            f"the plan was made for another model: it names {entry.title}, the model has "
            f"{listed(by_name, 4) or 'no linear layer'}"
        )
    if site.shape != entry.shape or set(site.names) != set(entry.sites):
        raise LowrankError(
            f"{entry.title}: the plan was made for another model: shape {entry.shape} under the "
            f"names {_titles(entry.sites)}; here it is {site.shape} under {_titles(site.names)}"
        )


def _titles(names: Sequence[str]) -> str:
    return listed(name or "(root)" for name in names)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries: those that affect results, if loaded."""
    loaded = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("lowrank", "transformers"):
        if package in sys.modules:
            try:
                loaded[package] = installed(package)
            except PackageNotFoundError:  # run from a source tree that was never installed
                loaded[package] = "source"
    return loaded


def version() -> str:
    """Version of this library, imported by name since the package imports this module."""
    package = importlib.import_module(__name__.partition(".")[0])
    return str(getattr(package, "__version__", "unknown"))
