"""What was asked for: every argument of the verbs, stated and checked once.

`plan`, `compress` and `sweep` take the fields of the classes below as flat arguments, and so do the
commands of the same names; arguments.py says what each of them means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ..calibration.batches import Data
from ..calibration.statistics import Calibration
from ..errors import LowrankError, unknown
from ..methods.resolved import Resolved, declared, joint_of, method_of, own_form, resolve
from ..plans.plan import Plan
from ..policies import judges, policy_of
from ..recover.recovery import Effort, Recovery, effort_of
from ..types import (
    UNITS,
    JointMethod,
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
HOLD_OUT = 1 / 8  # of the calibration rows, kept for judging where something is judged
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """What the verbs have in common."""

    method: str | Method | JointMethod | None = None
    policy: str | Policy | None = None
    data: Source = "default"
    tokenizer: Any = None
    effort: str | Recovery | Effort | None = None
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
        if not _is_int(self.seed):
            raise LowrankError(f"seed must be an integer, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))
        if self.align is not None and (not _is_int(self.align) or self.align < 1):
            raise LowrankError(f"align must be a positive integer or None, got {self.align!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ranks(Options):
    rank: int | float | None = None
    rank_pattern: Mapping[str, int | float] | None = None


@dataclass(frozen=True, eq=False)
class Request(_Ranks):
    """The arguments of `plan`: one of ratio and rank, or a rank_pattern that names every rank."""

    ratio: float | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        super().__post_init__()
        if isinstance(self.rank, int) and self.rank % (self.align or 1):
            raise LowrankError(f"rank={self.rank} is no multiple of align={self.align}")
        joint = joint_of(self.method, self.seed)
        if joint is not None:
            self._check_joint()
        if own_form(self.method):
            self._check_own_form()
        if self.effort is not None:
            self._take(effort_of(self.effort))
        if self.method is not None and joint is None:
            method_of(cast(Any, self.method), self.seed)
        if self.policy is not None:
            policy_of(self.policy)
            if self.ratio is None:
                raise LowrankError("a policy shares out a ratio; with fixed ranks leave it out")

    def _check_sizes(self) -> None:
        if self.ratio is not None and self.rank is not None:
            raise LowrankError("give either ratio or rank, not both")
        pattern = {} if self.rank_pattern is None else self.rank_pattern
        if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
            raise LowrankError(f"rank_pattern must map names to ranks, got {pattern!r}")
        if self.ratio is None and self.rank is None and not pattern:
            raise LowrankError("say how small: ratio=0.6, rank=32 or rank_pattern={'q_proj': 32}")
        # NumPy's numbers compute alike, but print and serialise otherwise.
        if self.ratio is not None:
            object.__setattr__(self, "ratio", _ratio(self.ratio))
        if self.rank is not None:
            object.__setattr__(self, "rank", _rank("rank", self.rank))
        plain = {key: _rank(f"rank_pattern[{key!r}]", value) for key, value in pattern.items()}
        object.__setattr__(self, "rank_pattern", plain)

    def _check_joint(self) -> None:
        """Raises LowrankError for what takes layers one by one beside a method of groups."""
        said = f"the method {self.method!r:.80} gives several layers one basis: leave it out"
        if self.storage == "pivoted":
            raise LowrankError(f"storage='pivoted' pivots one layer's own factors, and {said}")
        if self.effort is not None:
            raise LowrankError(f"effort={self.effort!r:.80} refits layers one by one, and {said}")

    def _check_own_form(self) -> None:
        """Raises LowrankError for what speaks of ranks beside a method that has none."""
        said = f"the method {self.method!r:.80} stores layers in a form of its own"
        ranks = [self.rank, *(self.rank_pattern or {}).values()]
        if any(isinstance(rank, int) for rank in ranks):
            raise LowrankError(
                f"{said}, sized by several numbers, not by a rank: give a ratio, or the share of "
                "energy to keep; plan.edit changes single sizes"
            )
        if self.align not in (None, 1):
            raise LowrankError(f"align={self.align} rounds ranks, and {said}: leave align out")
        if self.storage is not None:
            raise LowrankError(
                f"storage={self.storage!r} is a form of plain factors, and {said}: leave it out"
            )

    def _take(self, effort: Effort) -> None:
        """What an effort stands for, wherever nothing else was said."""
        if self.method is None:
            object.__setattr__(self, "method", effort.method)
        if self.policy is None and self.ratio is not None:
            object.__setattr__(self, "policy", effort.policy)
        if self.storage is None and not own_form(self.method):
            object.__setattr__(self, "storage", effort.storage)

    @property
    def recovery(self) -> Recovery | None:
        """What follows the replacement."""
        return None if self.effort is None else effort_of(self.effort).recovery

    @property
    def hold_out(self) -> float:
        """The share of the calibration rows that no statistic sees, because something is judged
        by the model's predictions on them: recovery, allocations, or forms of storage."""
        judged = isinstance(declared(self.method), SeveralForms)
        judged = judged or (self.policy is not None and judges(self.policy))
        compared = judged and self.ratio is not None
        return HOLD_OUT if compared or self.effort is not None else 0.0

    def resolved(self, *, data: bool) -> Resolved:
        """The method, found once.

        Args:
            data: whether there are, or will be, statistics.
        """
        return resolve(self.method, seed=self.seed, storage=self.storage or "factors", data=data)

    def needs(self) -> frozenset[str]:
        """Statistics that the method reads; none where it is left open."""
        return frozenset() if self.method is None else self.resolved(data=True).needs

    def stored(self, site: Site) -> tuple[str, int, str]:
        """What break-even asks: storage of a site's factors, bytes of one number, kind."""
        storage = self.storage if site.kind == "linear" else None
        return storage or "factors", site.cost.bytes // max(site.cost.params, 1), site.kind

    def asked(self) -> dict[str, Any]:
        """What the plan remembers of the wish itself."""
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

    def __post_init__(self) -> None:
        """Checked by the request that is made of it, or beside a plan."""

    def request(self) -> Request:
        return Request(**{f.name: getattr(self, f.name) for f in fields(Request)})

    def check_beside_plan(self) -> None:
        """Raises LowrankError when arguments beside a finished plan would be passed over."""
        taken = {"ratio", "data", "tokenizer", "copy", "progress"}
        if not isinstance(self.method, str):
            taken.add("method")  # an object can carry the plan out
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        spare = [name for name in given if name not in taken]
        if spare:
            raise LowrankError(
                f"the plan already decides {', '.join(spare)}: leave that out, "
                "change the plan by plan.edit(…), or make a new one"
            )


@dataclass(frozen=True, eq=False)
class Sweeping(Options):
    """The arguments of `sweep`."""

    ratios: Sequence[float] = RATIOS
    judge: Any = field(default=None, kw_only=True)
    cache: str | Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Checked by the requests that are made of it."""

    def request(self, ratio: float) -> Request:
        common = {f.name: getattr(self, f.name) for f in fields(Options)}
        return Request(ratio, **common)


def _rank(what: str, value: Any) -> int | float:
    """An integer from 1 on is a rank; a float in (0, 1] is a share of the energy."""
    if _is_int(value) and value >= 1:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < float(value) <= 1:
        return float(value)
    raise LowrankError(
        f"{what} must be an integer >= 1 (a rank) or a float in (0, 1] (the share of energy "
        f"kept), got {value!r}"
    )


def _ratio(ratio: Any) -> float:
    if not isinstance(ratio, Real) or not 0 < float(ratio) < 1:
        raise LowrankError(
            f"ratio is the fraction kept and must be in (0, 1), got {ratio!r}; "
            "0.8 keeps 80 % of the targeted weights"
        )
    return float(ratio)


def _check_word(what: str, got: Any, known: tuple[str, ...]) -> None:
    if got not in known:
        raise unknown(what, str(got), known)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
