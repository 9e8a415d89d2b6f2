"""What was asked for, checked before anything else happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, cast, get_args

from torch import nn

from ..errors import LowrankError, listed, unknown
from ..methods import joint, own_form
from ..methods import method as method_of
from ..nn import is_factored
from ..policies import policy as policy_of
from ..recover.recovery import Recovery
from ..types import UNITS, JointMethod, Method, Policy, Site, Storage, Unit
from ..walk import layouts
from ..walk.sites import ALL_LINEAR, Patterns, check_rank_pattern, find_sites, select_sites
from .efforts import Effort
from .efforts import effort as effort_of

Of = Literal["targets", "model"]
Prefer = Literal["size", "speed"]
OnMissing = Literal["dense", "data-free", "error"]


@dataclass(frozen=True)
class Request:
    """The arguments of `compress` that shape a plan; see there."""

    ratio: float | None = None
    rank: int | float | None = None
    rank_pattern: Mapping[str, int | float] | None = None
    method: str | Method | JointMethod | None = None
    policy: str | Policy | None = None
    effort: str | Recovery | Effort | None = None
    of: Of = "targets"
    unit: Unit = "params"
    prefer: Prefer = "size"
    target_modules: Patterns = ALL_LINEAR
    exclude_modules: Patterns | None = None
    align: int | None = None
    on_missing: OnMissing = "dense"
    seed: int = 0
    storage: Storage | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        _check_word("of", self.of, get_args(Of))
        _check_word("unit", self.unit, UNITS)
        _check_word("prefer", self.prefer, get_args(Prefer))
        _check_word("on_missing", self.on_missing, get_args(OnMissing))
        if self.storage is not None:
            _check_word("storage", self.storage, get_args(Storage))
        if not _is_int(self.seed):
            raise LowrankError(f"seed must be an integer, got {self.seed!r}")
        object.__setattr__(self, "seed", int(self.seed))
        shared = joint(self.method, self.seed)
        if shared is not None:
            self._check_joint()
        if own_form(self.method):
            self._check_own_form()
        if self.effort is not None:
            self._take(effort_of(self.effort))
        if self.method is not None and shared is None:
            method_of(cast(Any, self.method), self.seed)
        if self.policy is not None:
            policy_of(self.policy)
            if self.ratio is None:
                raise LowrankError("a policy shares out a ratio; with fixed ranks leave it out")

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
        open_now = {"method": effort.method, "storage": effort.storage, "policy": effort.policy}
        for name, value in open_now.items():
            if name == "storage" and own_form(self.method):
                continue
            if getattr(self, name) is None and (name != "policy" or self.ratio is not None):
                object.__setattr__(self, name, value)

    @property
    def recovery(self) -> Recovery | None:
        """What follows the replacement."""
        return None if self.effort is None else effort_of(self.effort).recovery

    def _check_sizes(self) -> None:
        if self.ratio is not None and self.rank is not None:
            raise LowrankError("give either ratio or rank, not both")
        pattern = {} if self.rank_pattern is None else self.rank_pattern
        if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
            raise LowrankError(f"rank_pattern must map names to ranks, got {pattern!r}")
        if self.ratio is None and self.rank is None and not pattern:
            raise LowrankError("say how small: ratio=0.6, rank=32 or rank_pattern={'q_proj': 32}")
        if self.align is not None and (not _is_int(self.align) or self.align < 1):
            raise LowrankError(f"align must be a positive integer or None, got {self.align!r}")
        # NumPy's numbers compute alike, but print and serialise otherwise.
        if self.ratio is not None:
            object.__setattr__(self, "ratio", _ratio(self.ratio))
        if self.rank is not None:
            object.__setattr__(self, "rank", _rank("rank", self.rank))
            if isinstance(self.rank, int) and self.rank % (self.align or 1):
                raise LowrankError(f"rank={self.rank} is no multiple of align={self.align}")
        plain = {key: _rank(f"rank_pattern[{key!r}]", value) for key, value in pattern.items()}
        object.__setattr__(self, "rank_pattern", plain)

    def needs(self) -> frozenset[str]:
        """Statistics that the method reads; none where it is left open."""
        shared = joint(self.method, self.seed)
        if shared is not None:
            return shared.needs | method_of(shared.alone, self.seed).needs
        named = cast(str | Method | None, self.method)
        return frozenset() if named is None else method_of(named, self.seed).needs

    def stored(self, site: Site) -> tuple[str, int]:
        """The storage of a site's factors, and the bytes of one number: what break-even asks."""
        storage = self.storage if site.kind == "linear" else None
        return storage or "factors", site.cost.bytes // max(site.cost.params, 1)

    def asked(self) -> dict[str, Any]:
        """What the plan remembers of the wish itself."""
        return {
            "ratio": self.ratio,
            "rank": self.rank,
            "rank_pattern": dict(self.rank_pattern) if self.rank_pattern else None,
            "of": self.of,
            "unit": self.unit,
        }


def check_beside_plan(given: Mapping[str, Any]) -> None:
    """Raises LowrankError when arguments beside a finished plan would be passed over."""
    spare = [f.name for f in fields(Request) if f.name != "ratio" and given[f.name] != f.default]
    if not isinstance(given["method"], str):
        spare = [name for name in spare if name != "method"]  # an object can carry the plan out
    if spare:
        raise LowrankError(
            f"the plan already decides {', '.join(spare)}: leave that out, "
            "change the plan by plan.edit(…), or make a new one"
        )


def targets_of(model: nn.Module, request: Request) -> list[Site]:
    """Every site considered; those without a reason are the targets.

    Raises:
        LowrankError: a pattern matches nothing, no target is left, or a weight is not finite.
    """
    sites = select_sites(find_sites(model), model, request.target_modules, request.exclude_modules)
    targets = [site for site in sites if not site.reason]
    if not targets:
        reasons = sorted({f"{site.title}: {site.reason}" for site in sites})
        factored = sum(map(is_factored, model.modules()))
        already = f"{factored} are factored already (lowrank.to_dense undoes it); "
        raise LowrankError(
            f"no layer can be factored: {already if factored else ''}"
            f"{listed(reasons, 4) or 'the model has no dense linear layer'}"
        )
    check_rank_pattern(request.rank_pattern or {}, sites)
    for site in targets:
        if not layouts.is_finite(site.module):
            raise LowrankError(f"{site.title}: the weight holds NaN or Inf")
    return sites


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
