"""One entry of a plan: a site, its chosen option, and the checks of manual edits."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import LowrankError
from ..nn import Form, form_of
from ..types import Cost, Curve, Option, Site, Size, Unit
from ..walk import layouts
from .schema import (
    COST,
    Checks,
    are_integers,
    is_cost,
    is_integer,
    is_number,
    is_text,
    require_fields,
)

COLUMNS = ("site", "shape", "method", "rank", "kept", "error", "reason")


@dataclass(frozen=True)
class Entry:
    """One site and its chosen option.

    Attributes:
        sites: every name of the weight; the first one identifies it.
        shape: (out, in) of the dense weight.
        dense: cost of the dense weight.
        method, size, storage, cost: of the chosen option; size None leaves the weight dense.
        error: planned, squared and absolute, in `norm`; None once edited by hand.
        total: error of the zero matrix, in `norm`; None without a curve.
        target: whether the site counts among the targets of the ratio.
        rcond: smallest over largest singular value of the decomposed matrix; 0 is singular.
        reason: why it stays dense, or "".
        kind: of the site.
        heads: output heads tied to an embedding.
        group: name of the site that owns the shared basis, "" for none; the owner names itself. The
            cost of `down` is the owner's, `error` and `total` are those of the whole group.
        repeats: for a budget of MACs: output positions, relative to the least-used layer; `macs` of
            both costs count all of them.
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
    kind: str = "linear"
    heads: int = 0
    group: str = ""
    repeats: int = 1

    @classmethod
    def of(
        cls,
        site: Site,
        option: Option | None = None,
        curve: Curve | None = None,
        *,
        reason: str = "",
        group: str = "",
        repeats: int = 1,
    ) -> Entry:
        """The entry of a site.

        Args:
            option: None leaves the site dense.
            curve: of the site or of its group, if any.
            reason, group, repeats: as in the entry; the default reason is the site's.
        """
        option = option or Option("dense", None, "dense", site.cost, 0.0)
        return cls(
            sites=site.names,
            shape=site.shape,
            dense=site.cost,
            method=option.method,
            size=option.size,
            storage=option.storage,
            cost=option.cost,
            error=option.error,
            total=None if curve is None else curve.total,
            norm="" if curve is None else curve.norm,
            target=True,
            rcond=None if curve is None else _rcond(curve),
            reason=reason or site.reason,
            kind=site.kind,
            heads=layouts.head_count(site.modules),
            group=group,
            repeats=repeats,
        )

    @property
    def name(self) -> str:
        return self.sites[0]

    @property
    def title(self) -> str:
        """The display name: "(root)" for the root module."""
        return self.name or "(root)"

    def option(self) -> Option:
        """The chosen option, as a method takes it; an unknown error counts as 0."""
        return Option(self.method, self.size, self.storage, self.cost, self.error or 0.0)

    def left_dense(self, reason: str) -> Entry:
        return replace(
            self, method="dense", size=None, storage="dense", cost=self.dense, error=0.0,
            reason=reason,
        )  # fmt: skip

    def with_size(self, size: int | Size, method: str, storage: str = "factors") -> Entry:
        """The entry with another size, a rank or the integers of its form, and unknown error.

        Args:
            method, storage: if the site was dense. A factored site keeps its own, but becomes plain
                factors if the shape of the weight does not determine the cost of its storage.

        Raises:
            LowrankError: an invalid size for this form and shape, or one that is not smaller.
        """
        if self.storage != "dense":
            method, storage = self.method, self.storage
        form = self._sizable(storage)
        if form is None:
            storage, form = "factors", self._sizable("factors")
        assert form is not None
        if form.SIZE == ("rank",):
            rank = size if isinstance(size, int) or len(size) != 1 else size[0]
            check_rank(self.title, self.shape, rank, storage, self._itemsize, self.kind)
            size = (rank,)  # type: ignore[assignment]  # require_fields
        cost = self._priced(form, size)
        return replace(
            self, method=method, size=tuple(size), storage=storage,  # type: ignore[arg-type]
            cost=cost.often(self.repeats), error=None, reason="",
        )  # fmt: skip

    def _sizable(self, storage: str) -> type[Form] | None:
        """The form of a storage, if the shape of the weight determines the cost of its sizes."""
        form = form_of(storage, self.kind)
        trial = (1,) * len(form.SIZE) if form else ()
        priced = form and form.size_cost(self.shape, trial, itemsize=self._itemsize)
        return form if priced else None

    def _priced(self, form: type[Form], size: Any) -> Cost:
        """Cost of a layer of this size; raises LowrankError unless it is below the dense one."""
        count = len(form.SIZE)
        numbers = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else ()
        if len(numbers) != count or not all(is_integer(n) and n >= 1 for n in numbers):
            raise LowrankError(
                f"{self.title}: the size of a layer stored as {form.STORAGE} has {count} integers "
                f">= 1 ({', '.join(form.SIZE)}), got {size!r}"
            )
        cost = form.size_cost(self.shape, numbers, itemsize=self._itemsize, heads=self.heads)
        assert cost is not None
        if cost.params >= self.dense.params or cost.bytes >= self.dense.bytes:
            raise LowrankError(
                f"{self.title}: {form.STORAGE} of size {numbers} is not smaller than the dense "
                f"layer of shape {self.shape}: {cost.bytes} bytes against {self.dense.bytes}"
            )
        return cost

    @property
    def _itemsize(self) -> int:
        return self.dense.bytes // max(self.dense.params, 1)

    def sharing(self, rank: int, owner: bool) -> Entry:
        """The entry with factors of that rank on a shared basis, which the owner stores."""
        numbers = rank * (self.shape[0] + owner * self.shape[1])
        cost = Cost(numbers, numbers * self.dense.bytes // self.dense.params, numbers)
        cost = cost.often(self.repeats)
        return replace(self, size=(rank,), storage="shared", cost=cost, error=None, reason="")

    def row(self) -> dict[str, str]:
        """The entry as text, for tables."""
        return {
            "site": self.title if not self.heads else f"{self.title} (tied: {self.sites[-1]})",
            "shape": f"{self.shape[0]}x{self.shape[1]}",
            "method": f"{self.method}{', pivoted' * (self.storage == 'pivoted')}",
            "rank": "" if self.size is None else ",".join(map(str, self.size)),
            "kept": f"{self._kept():.3f}",
            "error": relative(self.error, self.total),
            "reason": self.reason,
        }

    def _kept(self) -> float:
        """The share of parameters, of bytes where those of integers show nothing."""
        form = form_of(self.storage, self.kind)
        unit: Unit = "bytes" if form is not None and form.CODED else "params"
        return self.cost.of(unit) / max(self.dense.of(unit), 1)

    @classmethod
    def from_json(cls, item: Any, method: str, storage: str = "factors") -> Entry:
        """The entry of a JSON object that may have been edited; costs are recomputed from the size.

        Args:
            method, storage: for a dense site that was given a size.

        Raises:
            LowrankError: a field is missing, unknown or of the wrong type; the site is named.
        """
        require_fields(item, _FIELDS, "an entry of the plan")
        size = None if item["size"] is None else tuple(item["size"])
        body = {**item, "sites": tuple(item["sites"]), "shape": tuple(item["shape"]), "size": size}
        entry = cls(**{**body, "dense": Cost(**item["dense"]), "cost": Cost(**item["cost"])})
        if size is None:
            same = entry.cost == entry.dense
            return entry if same else entry.left_dense("left dense by hand")
        if entry.storage != "dense" and entry._sizable(entry.storage) is None:
            return entry
        resized = entry.with_size(size, method, storage)
        return entry if resized.cost == entry.cost else resized


def relative(error: float | None, total: float | None) -> str:
    """The relative error √(error / total), as text; "" if unknown."""
    if error is None or total is None:
        return ""
    return f"{(error / total) ** 0.5 if total > 0 else 0.0:.4f}"


def check_rank(
    title: str,
    shape: Sequence[int],
    rank: Any,
    storage: str = "factors",
    itemsize: int = 4,
    kind: str = "linear",
) -> None:
    """Raises LowrankError unless the rank is valid for this shape and makes the layer smaller."""
    out_features, in_features = shape
    even = break_even(shape, storage, itemsize, kind)
    if not is_integer(rank) or not 1 <= rank <= min(shape) or rank >= even:
        raise LowrankError(
            f"rank must be in [1, {min(shape)}] for {title} of shape "
            f"({out_features}, {in_features}), got {rank!r}; from {even} on a "
            f"{'pivoted' if storage == 'pivoted' else 'factored'} layer is not smaller than the "
            "dense one"
        )


def break_even(
    shape: Sequence[int], storage: str = "factors", itemsize: int = 4, kind: str = "linear"
) -> int:
    """The least rank at which a layer of this storage is not smaller than a dense (out, in).

    Args:
        itemsize: bytes of one number.
        kind: of the layer.
    """
    form = form_of(storage, kind) or form_of("factors", kind)
    assert form is not None
    numbers = math.prod(shape)

    def is_smaller(rank: int) -> bool:
        cost = form.size_cost(shape, (rank,), itemsize=itemsize)
        return cost is not None and cost.params < numbers and cost.bytes < numbers * itemsize

    ranks = range(1, min(shape) + 1)  # cost rises with the rank
    return 1 + bisect.bisect_left(ranks, True, key=lambda rank: not is_smaller(rank))


def _rcond(curve: Curve) -> float | None:
    if curve.spectrum is None or not len(curve.spectrum):
        return None
    most = float(curve.spectrum[0])
    return float(curve.spectrum[-1]) / most if most > 0 else 0.0


def _is_size(value: Any) -> bool:
    return value is None or (bool(value) and are_integers(value))


def _is_shape(value: Any) -> bool:
    return are_integers(value) and len(value) == 2


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


_TEXT = (is_text, "text")
_NUMBER = (is_number, "a number >= 0 or null")
_FIELDS: Checks = {
    "sites": (_are_names, "a list of names"),
    "shape": (_is_shape, "two integers >= 0"),
    "dense": (is_cost, COST),
    "method": _TEXT,
    "size": (_is_size, "a list of integers >= 0, or null"),
    "storage": _TEXT,
    "cost": (is_cost, COST),
    "error": _NUMBER,
    "total": _NUMBER,
    "norm": _TEXT,
    "target": (lambda value: isinstance(value, bool), "true or false"),
    "rcond": _NUMBER,
    "reason": _TEXT,
    "kind": _TEXT,
    "heads": (lambda value: is_integer(value) and value >= 0, "an integer >= 0"),
    "group": _TEXT,
    "repeats": (lambda value: is_integer(value) and value >= 1, "an integer >= 1"),
}
