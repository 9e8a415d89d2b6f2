"""What was asked for, checked before anything else happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from torch import nn

from .. import layouts
from .. import sites as walk
from ..errors import LowrankError, listed, unknown
from ..methods import method as method_of
from ..policies import policy as policy_of
from ..types import UNITS, Cost, Method, Policy, Site, Unit

Of = Literal["targets", "model"]
Prefer = Literal["size", "speed"]
OnMissing = Literal["dense", "data-free", "error"]


@dataclass(frozen=True)
class Request:
    """The arguments of `compress` that shape a plan; see there."""

    ratio: float | None = None
    rank: int | float | None = None
    rank_pattern: Mapping[str, int | float] | None = None
    method: str | Method | None = None
    policy: str | Policy | None = None
    effort: str | None = None
    of: Of = "targets"
    unit: Unit = "params"
    prefer: Prefer = "size"
    target_modules: walk.Patterns = walk.ALL_LINEAR
    exclude_modules: walk.Patterns | None = None
    align: int | None = None
    on_missing: OnMissing = "dense"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ratio is not None and self.rank is not None:
            raise LowrankError("give either ratio or rank, not both")
        if self.ratio is None and self.rank is None and not self.rank_pattern:
            raise LowrankError("say how small: ratio=0.6, rank=32 or rank_pattern={…}")
        if self.ratio is not None:
            _check_ratio(self.ratio)
            object.__setattr__(self, "ratio", float(self.ratio))  # NumPy's floats print otherwise
        if self.rank is not None:
            check_rank_value("rank", self.rank)
        for name, value in (self.rank_pattern or {}).items():
            check_rank_value(f"rank_pattern[{name!r}]", value)
        if self.method is not None:
            method_of(self.method, self.seed)
        if self.policy is not None:
            policy_of(self.policy)
        if self.effort is not None:
            raise LowrankError(
                f"effort={self.effort!r}: recovery comes with a later version; leave it out"
            )
        if self.align is not None and (not _is_int(self.align) or self.align < 1):
            raise LowrankError(f"align must be a positive integer or None, got {self.align!r}")
        _check_word("of", self.of, get_args(Of))
        _check_word("unit", self.unit, UNITS)
        _check_word("prefer", self.prefer, get_args(Prefer))
        _check_word("on_missing", self.on_missing, get_args(OnMissing))

    def asked(self) -> dict[str, Any]:
        """What the plan remembers of the wish itself."""
        pattern = dict(self.rank_pattern) if self.rank_pattern else None
        return {
            "ratio": self.ratio,
            "rank": self.rank,
            "rank_pattern": pattern,
            "of": self.of,
            "unit": self.unit,
        }


def check_model(model: Any) -> None:
    """Raises LowrankError for what is no module, lies on the meta device, or is quantized."""
    if not isinstance(model, nn.Module):
        raise LowrankError(f"expected a torch.nn.Module, got {type(model).__name__}")
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise LowrankError(
            f"{len(meta)} parameters are on the meta device ({listed(meta, 3)}): load the weights"
        )
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    if stored is not None:
        kind = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
        if str(getattr(kind, "value", kind)) != "lowrank":
            raise LowrankError(
                f"the model is quantized ({getattr(kind, 'value', kind)}): compress the model "
                "first and quantize the result"
            )


def targets_of(model: nn.Module, request: Request) -> list[Site]:
    """Every site considered; those without a reason are the targets.

    Raises:
        LowrankError: a pattern matches nothing, no target is left, or a weight is not finite.
    """
    sites = walk.select(walk.find(model), model, request.target_modules, request.exclude_modules)
    walk.check_rank_pattern(request.rank_pattern or {}, sites)
    targets = [site for site in sites if not site.reason]
    if not targets:
        reasons = sorted({f"{site.name or '(root)'}: {site.reason}" for site in sites})
        raise LowrankError(
            f"no layer can be factored; {listed(reasons, 4) or 'the model has no linear layer'}"
        )
    for site in targets:
        if not layouts.is_finite(site.module):
            raise LowrankError(f"{site.name or '(root)'}: the weight holds NaN or Inf")
    return sites


def model_cost(model: nn.Module, sites: list[Site]) -> Cost:
    """Parameters and bytes of the whole model, each stored tensor once; macs of its linears."""
    unique = {id(parameter): parameter for parameter in model.parameters()}.values()
    return Cost(
        params=sum(p.numel() for p in unique),
        bytes=sum(p.numel() * p.dtype.itemsize for p in unique),
        macs=sum(site.cost.macs for site in sites),
    )


def check_rank_value(what: str, value: Any) -> None:
    """An int from 1 on is a rank; a float in (0, 1] is a share of the energy."""
    good = (_is_int(value) and value >= 1) or (isinstance(value, float) and 0 < value <= 1)
    if not good:
        raise LowrankError(
            f"{what} must be an integer >= 1 (a rank) or a float in (0, 1] (the share of energy "
            f"kept), got {value!r}"
        )


def _check_ratio(ratio: Any) -> None:
    number = isinstance(ratio, Real) and not isinstance(ratio, bool)
    if not number or not 0 < ratio < 1:
        raise LowrankError(
            f"ratio is the fraction kept and must be in (0, 1), got {ratio!r}; "
            "0.8 keeps 80 % of the targeted weights"
        )


def _check_word(what: str, got: Any, known: tuple[str, ...]) -> None:
    if got not in known:
        raise unknown(what, str(got), known)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
