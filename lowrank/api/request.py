"""Requests: the arguments of the verbs, declared and checked once.

`plan`, `compress` and `sweep`, and the commands of the same names, take the fields of these classes
as flat arguments; arguments.py describes each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ..calibration.batches import Data, check_rows
from ..calibration.processes import is_main
from ..calibration.statistics import Calibration
from ..errors import LowrankError, listed, unknown
from ..methods.resolved import Resolved, declared, joint_of, method_of, own_form, resolve
from ..plans.plan import Plan
from ..policies import judges, policy_of
from ..recover.recovery import Effort, Recovery, check_minutes, effort_of
from ..types import (
    UNITS,
    JointMethod,
    Measured,
    Method,
    Policy,
    SeveralForms,
    Site,
    Storage,
    Unit,
)
from ..walk.sites import ALL_LINEAR, Patterns

Of = Literal["targets", "model"]
Prefer = Literal["size", "speed"]
OnMissing = Literal["dense", "data-free", "error"]
Source = Data | Calibration | Literal["default"] | None
HOLD_OUT = 1 / 8  # share of the calibration rows held out, if something is judged
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """Arguments that all verbs share."""

    method: str | Method | JointMethod | None = None
    policy: str | Policy | None = None
    data: Source = "default"
    tokenizer: Any = None
    rows: int | None = None
    effort: str | Recovery | Effort | None = None
    minutes: float | None = None
    of: Of = "targets"
    unit: Unit = "params"
    prefer: Prefer = "size"
    target_modules: Patterns = ALL_LINEAR
    exclude_modules: Patterns | None = None
    align: int | None = None
    storage: Storage | None = None
    on_missing: OnMissing = "dense"
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        _check_word("of", self.of, get_args(Of))
        _check_word("unit", self.unit, UNITS)
        _check_word("prefer", self.prefer, get_args(Prefer))
        _check_word("on_missing", self.on_missing, get_args(OnMissing))
        if self.storage is not None:
            _check_word("storage", self.storage, get_args(Storage))
        check_rows(self.rows)
        if not _is_int(self.seed):
            raise LowrankError(f"seed must be an integer, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "progress", self.progress and is_main())
        if self.align is not None and (not _is_int(self.align) or self.align < 1):
            raise LowrankError(f"align must be a positive integer or None, got {self.align!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ranks(Options):
    rank: int | float | None = None
    rank_pattern: Mapping[str, int | float] | None = None


@dataclass(frozen=True, eq=False)
class Request(_Ranks):
    """The arguments of `plan`: one of ratio and rank, or a rank_pattern alone."""

    ratio: float | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        super().__post_init__()
        if isinstance(self.rank, int) and self.rank % (self.align or 1):
            raise LowrankError(f"rank={self.rank} is not a multiple of align={self.align}")
        if self.method == "auto" and self.unit == "bytes" and self.ratio is not None:
            object.__setattr__(self, "method", "quantized")  # nearer than every form of 16 bits
        joint = joint_of(self.method, self.seed)
        if joint is not None:
            self._check_joint()
        if own_form(self.method):
            self._check_own_form()
        if self.minutes is not None:
            self._check_minutes()
        self._check_unit()
        if self.effort is not None:
            self._take(effort_of(self.effort))
            self._check_nested(effort_of(self.effort).recovery.nested)
        if self.method is not None and joint is None:
            method_of(cast(Any, self.method), self.seed)
        if self.policy is not None:
            policy_of(self.policy)
            if self.ratio is None:
                raise LowrankError(
                    "policy divides a ratio among the layers: drop it where ranks are fixed"
                )

    def _check_sizes(self) -> None:
        if self.ratio is not None and self.rank is not None:
            raise LowrankError("give either ratio or rank, not both")
        pattern = {} if self.rank_pattern is None else self.rank_pattern
        if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
            raise LowrankError(f"rank_pattern must map names to ranks, got {pattern!r}")
        if self.ratio is None and self.rank is None and not pattern:
            raise LowrankError(
                "no target size: give ratio=0.6, rank=32 or rank_pattern={'q_proj': 32}"
            )
        # NumPy scalars print and serialise differently.
        if self.ratio is not None:
            object.__setattr__(self, "ratio", checked_ratio(self.ratio))
        if self.rank is not None:
            object.__setattr__(self, "rank", _rank("rank", self.rank))
        plain = {key: _rank(f"rank_pattern[{key!r}]", value) for key, value in pattern.items()}
        object.__setattr__(self, "rank_pattern", plain)

    def _check_minutes(self) -> None:
        """Raises LowrankError for a time that is none, or that nothing would use."""
        check_minutes(self.minutes)
        if self.effort is None:
            raise LowrankError(
                f"minutes={self.minutes!r} is the time of an effort, and there is none: add "
                "effort='balanced' or 'best'"
            )
        object.__setattr__(self, "minutes", float(cast(float, self.minutes)))
        _ = self.recovery  # which must train something

    def _check_joint(self) -> None:
        """Raises LowrankError for options that need layers one by one, with a joint method."""
        advice = f"method {self.method!r:.80} gives several layers one basis: drop one of the two"
        if self.storage == "pivoted":
            raise LowrankError(f"storage='pivoted' pivots one layer's own factors, but {advice}")
        if self.effort is not None:
            raise LowrankError(f"effort={self.effort!r:.80} refits layers one by one, but {advice}")

    def _check_own_form(self) -> None:
        """Raises LowrankError for options about ranks, with a method whose form has none."""
        reason = f"method {self.method!r:.80} stores layers in a form of its own"
        ranks = [self.rank, *(self.rank_pattern or {}).values()]
        if any(isinstance(rank, int) for rank in ranks):
            raise LowrankError(
                f"{reason}, whose size is not the rank of two factors: give a ratio or a share of "
                "energy; plan.edit changes single sizes"
            )
        if self.align not in (None, 1):
            raise LowrankError(f"align={self.align} rounds ranks, but {reason}: drop align")
        if self.storage is not None:
            raise LowrankError(
                f"storage={self.storage!r} is for plain factors, but {reason}: drop storage"
            )

    def _check_nested(self, least: float | None) -> None:
        """Raises LowrankError where no truncation down to that ratio could be trained."""
        if least is None:
            return
        if self.storage != "factors":
            raise LowrankError(
                f"nested={least} cuts layers between their components, which method "
                f"{self.method!r:.80} with storage={self.storage!r} does not keep apart: give a "
                "method with a rank, and storage='factors'"
            )
        if self.ratio is not None and self.ratio <= least:
            raise LowrankError(
                f"ratio={self.ratio} is the largest to be served, and nested={least} the least: "
                "give a ratio above it"
            )

    def _check_unit(self) -> None:
        """Raises LowrankError for a unit that does not measure the method's sizes."""
        method = declared(self.method)
        if not isinstance(method, Measured) or self.ratio is None or self.unit in method.units:
            return
        raise LowrankError(
            f"unit={self.unit!r} does not measure what method {self.method!r:.80} saves: "
            f"give unit={listed(sorted(map(repr, method.units)))}"
        )

    def _take(self, effort: Effort) -> None:
        """Set what the effort stands for, where the caller did not."""
        if self.method is None:
            object.__setattr__(self, "method", effort.method)
        if self.policy is None and self.ratio is not None:
            object.__setattr__(self, "policy", effort.policy)
        if self.storage is None and not own_form(self.method):
            object.__setattr__(self, "storage", effort.storage)

    @property
    def recovery(self) -> Recovery | None:
        """The recovery that the effort asks for; None without an effort."""
        if self.effort is None:
            return None
        recovery = effort_of(self.effort).recovery
        return recovery if self.minutes is None else replace(recovery, minutes=self.minutes)

    @property
    def hold_out(self) -> float:
        """Share of the calibration rows held out from all statistics; 0 if nothing is judged.

        Recovery, allocations and storage forms are judged by the predictions on these rows.
        """
        compares = isinstance(declared(self.method), SeveralForms)
        compares = compares or (self.policy is not None and judges(self.policy))
        compares = compares and self.ratio is not None
        return HOLD_OUT if compares or self.effort is not None else 0.0

    def resolved(self, *, data: bool) -> Resolved:
        """The request's method, looked up.

        Args:
            data: whether there are, or will be, statistics.
        """
        return resolve(self.method, seed=self.seed, storage=self.storage or "factors", data=data)

    def needs(self) -> frozenset[str]:
        """Statistics that the method needs; none if no method was given."""
        return frozenset() if self.method is None else self.resolved(data=True).needs

    def stored(self, site: Site) -> tuple[str, int, str]:
        """The arguments of `break_even`: storage of a site's factors, bytes per number, kind."""
        storage = self.storage if site.kind == "linear" else None
        return storage or "factors", site.cost.bytes // max(site.cost.params, 1), site.kind

    def said(self) -> dict[str, str]:
        """What the processes have to have in common, in words; the data shows when it is read."""
        own = {"data", "tokenizer", "progress"}
        return {f.name: _said(getattr(self, f.name)) for f in fields(self) if f.name not in own}

    def asked(self) -> dict[str, Any]:
        """The target size, as the plan records it."""
        return {
            "ratio": self.ratio,
            "rank": self.rank,
            "rank_pattern": dict(self.rank_pattern) if self.rank_pattern else None,
            "of": self.of,
            "unit": self.unit,
        }


@dataclass(frozen=True, eq=False)
class Compression(_Ranks):
    """The arguments of `compress`."""

    ratio: float | Plan | None = None
    copy: bool = field(default=False, kw_only=True)
    out: str | Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """No checks here: `request` and `check_beside_plan` make them."""

    def request(self) -> Request:
        return Request(**{f.name: getattr(self, f.name) for f in fields(Request)})

    def check_beside_plan(self) -> None:
        """Raises LowrankError for arguments that a finished plan would ignore."""
        taken = {"ratio", "data", "tokenizer", "rows", "copy", "out", "progress"}
        if not isinstance(self.method, str):
            taken.add("method")  # an object can carry out the plan
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        ignored = [name for name in given if name not in taken]
        if ignored:
            raise LowrankError(
                f"the plan already fixes {', '.join(ignored)}: drop that, change the plan with "
                "plan.edit(…), or make a new one"
            )


@dataclass(frozen=True, eq=False)
class Sweeping(Options):
    """The arguments of `sweep`."""

    ratios: Sequence[float] = RATIOS
    judge: Any = field(default=None, kw_only=True)
    cache: str | Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """No checks here: `request` makes them."""

    def request(self, ratio: float) -> Request:
        common = {f.name: getattr(self, f.name) for f in fields(Options)}
        return Request(ratio, **common)


def _rank(what: str, value: Any) -> int | float:
    """Check a rank: an integer >= 1, or a float in (0, 1], the share of energy kept."""
    if _is_int(value) and value >= 1:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < float(value) <= 1:
        return float(value)
    raise LowrankError(
        f"{what} must be an integer >= 1 (a rank) or a float in (0, 1] (the share of energy "
        f"kept), got {value!r}"
    )


def checked_ratio(ratio: Any) -> float:
    """Raises LowrankError unless it is a number in (0, 1)."""
    if not isinstance(ratio, Real) or not 0 < float(ratio) < 1:
        raise LowrankError(
            f"ratio is the fraction kept and must be in (0, 1), got {ratio!r}; "
            "0.8 keeps 80 % of the targeted weights"
        )
    return float(ratio)


def _said(value: Any) -> str:
    """What a value prints in every process: no addresses, and sets in order."""
    listed = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(listed))


def _check_word(what: str, got: Any, known: tuple[str, ...]) -> None:
    if got not in known:
        raise unknown(what, str(got), known)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
