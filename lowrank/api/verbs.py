"""The three verbs: plan decides, apply acts, compress does both."""

from __future__ import annotations

import copy as copying
import time
from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import nn

from ..calibration.batches import Data
from ..calibration.fisher import FISHER, with_fisher
from ..calibration.self_written import described, writes
from ..calibration.statistics import SELF, Calibration, calibrate
from ..errors import LowrankError
from ..plans.plan import Plan
from ..plans.report import Report
from ..recover.recovery import Recovery
from ..types import JointMethod, Method, Policy, Storage, Unit
from ..walk.checks import check_model
from ..walk.sites import ALL_LINEAR, Patterns
from .allocating import Curves
from .applying import carry_out, matched
from .building import method_for
from .efforts import Effort
from .planning import make_plan
from .request import Of, OnMissing, Prefer, Request, check_beside_plan, targets_of

HOLD_OUT = 1 / 8  # of the calibration rows, kept for judging where something is judged
Source = Data | Calibration | Literal["default"] | None


def plan(
    model: nn.Module,
    ratio: float | None = None,
    *,
    method: str | Method | JointMethod | None = None,
    policy: str | Policy | None = None,
    rank: int | float | None = None,
    rank_pattern: Mapping[str, int | float] | None = None,
    data: Source = "default",
    tokenizer: Any = None,
    effort: str | Recovery | Effort | None = None,
    of: Of = "targets",
    unit: Unit = "params",
    prefer: Prefer = "size",
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    align: int | None = None,
    storage: Storage | None = None,
    on_missing: OnMissing = "dense",
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Decide what every layer becomes, and change nothing. Arguments as for `compress`."""
    request = Request(
        ratio=ratio, method=method, policy=policy, rank=rank, rank_pattern=rank_pattern,
        effort=effort, of=of, unit=unit, prefer=prefer, target_modules=target_modules,
        exclude_modules=exclude_modules, align=align, storage=storage, on_missing=on_missing,
        seed=seed,
    )  # fmt: skip
    return _decide(model, request, data, tokenizer, progress)[0]


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    data: Source = "default",
    tokenizer: Any = None,
    method: Method | JointMethod | None = None,
    copy: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, Report]:
    """Carry out a plan, also one that was edited or read from JSON.

    Args:
        data: statistics for the factors; needed where the plan's method is activation-aware.
            "default": what the model wrote itself for the plan, which it writes again.
        method: the method object, for a plan made with one that the registry does not know.
        copy: work on a deep copy.

    Raises:
        LowrankError: the plan was made for another model, or lacks data; the model is unchanged.
    """
    started = time.perf_counter()
    if not isinstance(plan, Plan):
        raise LowrankError(f"apply carries out a Plan, got {plan!r:.80}; compress takes a ratio")
    check_model(model)
    work = matched(model, plan)
    ways = [method_for(entry, plan, method) for _, entry in work]
    needed = any(used.needs for used in ways) and _wrote(model, plan)
    recovers = plan.settings.get("recovery") is not None
    hold_out = HOLD_OUT if recovers else 0.0
    seen = _seen(model, data, tokenizer, needed, plan.seed, progress, hold_out)
    read = [site for (site, _), used in zip(work, ways, strict=True) if used.needs & FISHER]
    if seen is not None and read:
        seen = with_fisher(model, seen, read, seed=plan.seed, progress=progress)
    if copy:
        model = copying.deepcopy(model)
    return carry_out(model, plan, seen, way=method, curves=None, started=started, progress=progress)


def compress(
    model: nn.Module,
    ratio: float | Plan | None = None,
    *,
    method: str | Method | JointMethod | None = None,
    policy: str | Policy | None = None,
    rank: int | float | None = None,
    rank_pattern: Mapping[str, int | float] | None = None,
    data: Source = "default",
    tokenizer: Any = None,
    effort: str | Recovery | Effort | None = None,
    of: Of = "targets",
    unit: Unit = "params",
    prefer: Prefer = "size",
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    align: int | None = None,
    storage: Storage | None = None,
    on_missing: OnMissing = "dense",
    seed: int = 0,
    copy: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, Report]:
    """Replace linear layers by factored ones that keep `ratio` of their parameters.

    Args:
        model: changed in place and returned; a root that is itself a layer is returned anew.
        ratio: the fraction kept, in (0, 1); or a finished plan, beside which only data, tokenizer,
            copy, progress and a method object are taken.
        method: "svd", "whitened", "asvd", "snmf", "random", "basis-sharing" (one input basis for
            layers that read one tensor, "whitened" for the others), "dense-sparse" (a small basis,
            few coefficients in each row or each column), "lowrank-sparse" (some inputs in full),
            "lowrank-masked" and "lowrank-2:4" (single entries in full: smallest, never faster),
            "blast" (blocks with shared bases), "auto" (the best of these forms for each layer),
            "frequency", "head-aware" (the last two for embeddings) or an object; None: "whitened"
            with data, given or self-written, else "svd". Embeddings that "whitened" meets are
            factored by "head-aware".
        policy: "uniform", "energy", "welore", "spectrum", "evbmf", "lossaware" or a callable; None:
            "uniform", but "spectrum" for a net of convolutions without data. It shares out a ratio;
            fixed ranks leave it nothing to do.
        rank: instead of a ratio: an int for all sites, or a float in (0, 1], the share of energy.
        rank_pattern: name or regular expression -> rank; alone, or on top of ratio or rank. Its
            ranks are kept as they are, whatever `align` says.
        data: texts (with `tokenizer`), tensors, dicts, a loader, a callable `forward(model)`, or
            a `Calibration`. "self": a causal language model writes its calibration text itself,
            as `seed` decides. "default": "self" for such models where the method works from
            data, else None. None never runs the model.
        of: "targets" or "model": what the ratio is a share of.
        unit: "params", "bytes" or "macs".
        prefer: "speed" leaves a layer dense that is not faster at the data's shape.
        target_modules, exclude_modules: as in peft: names or endings, a regular expression, or
            "all-linear" (every linear layer and convolution but the output head and convolutions
            that read an image), or "all" (these and embeddings too; a head that shares the
            embedding's weight is factored with it, once).
        align: ranks are multiples of it; None rounds down to 8 where that is nearly free; 1: off.
        storage: of factored linear layers: "factors" (None too), r(m + n) numbers at rank r; or
            "pivoted", the same matrix in r(m + n − r), so that ranks are higher at equal cost;
            not where layers share a basis.
        on_missing: for layers that the data did not reach: "dense", "data-free" or "error".
        effort: "fast" (ranks by the loss, pivoted storage, sequential refit in closed form),
            "balanced" (and block refit), "best" (and distillation), or a `Recovery`; it sets what
            of method, policy and storage is not given. None: the replacement alone.
        copy: work on a deep copy.

    Returns:
        The model and a Report: print it.

    Raises:
        LowrankError: with what was got, what was expected and where; the model is unchanged then.
    """
    started = time.perf_counter()
    given: dict[str, Any] = {
        "method": method, "policy": policy, "rank": rank, "rank_pattern": rank_pattern,
        "effort": effort, "of": of, "unit": unit, "prefer": prefer, "align": align,
        "target_modules": target_modules, "exclude_modules": exclude_modules,
        "storage": storage, "on_missing": on_missing, "seed": seed,
    }  # fmt: skip
    way = None if method is None or isinstance(method, str) else method
    if isinstance(ratio, Plan):
        check_beside_plan(given)
        return apply(
            model, ratio, data=data, tokenizer=tokenizer, method=way, copy=copy, progress=progress
        )
    request = Request(ratio=ratio, **given)
    decided, curves, seen = _decide(model, request, data, tokenizer, progress)
    if copy:
        model = copying.deepcopy(model)
    return carry_out(
        model, decided, seen, way=way, curves=curves, started=started, progress=progress
    )


def _decide(
    model: nn.Module, request: Request, data: Source, tokenizer: Any, progress: bool
) -> tuple[Plan, Curves, Calibration | None]:
    """All checks that need no work come first: a typing error must not cost a calibration."""
    check_model(model)
    wanted = targets_of(model, request)
    needed = request.method is None or bool(request.needs())
    hold_out = HOLD_OUT if request.effort is not None or request.policy == "lossaware" else 0.0
    seen = _seen(model, data, tokenizer, needed, request.seed, progress, hold_out)
    if seen is not None and request.needs() & FISHER:
        seen = with_fisher(model, seen, wanted, seed=request.seed, progress=progress)
    return *make_plan(model, request, wanted, seen, progress=progress), seen


def _wrote(model: nn.Module, plan: Plan) -> bool:
    """Whether the model can write what the plan was made on; a plan of given data asks for that."""
    made_on = plan.settings.get("data")
    return writes(model) and made_on in (None, described(model, seed=plan.seed))


def _seen(
    model: nn.Module,
    data: Source,
    tokenizer: Any,
    needed: bool,
    seed: int,
    progress: bool,
    hold_out: float = 0.0,
) -> Calibration | None:
    """The statistics; "default" is the model's own text where that is needed and can be had."""
    if isinstance(data, str) and data == "default":
        data = SELF if needed and writes(model) else None
    if data is None:
        return None
    return calibrate(
        model, cast(Any, data), tokenizer=tokenizer, seed=seed, hold_out=hold_out, progress=progress
    )
