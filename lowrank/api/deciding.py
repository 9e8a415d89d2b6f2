"""From a request to a plan: sites, data and statistics, curves, and the choice among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from ..calibration.chain import Recordings
from ..calibration.digests import data_print, model_print
from ..calibration.fisher import FISHER, with_fisher
from ..calibration.processes import check_same, check_unwrapped, is_main, world
from ..calibration.self_written import writes
from ..calibration.statistics import SELF, Calibration, calibrate
from ..errors import LowrankError, listed
from ..methods import JOINT, METHODS
from ..methods.resolved import Given, Resolved, resolve
from ..nn import is_factored
from ..plans.plan import Plan
from ..plans.progress import expect
from ..plans.stages import stage
from ..policies.common import judges
from ..recover.workbench import Workbench
from ..types import Site
from ..walk import layouts
from ..walk.sites import check_rank_pattern, select_sites
from .allocating import Curves, bench_of, hold_out_of
from .parting import Parted, of_calibration, of_sites, parted, split_as_planned
from .planning import make_plan
from .request import Request, Source
from .resuming import Work


class Decision(NamedTuple):
    """A plan and what it was made from."""

    plan: Plan
    curves: Curves
    resolved: Resolved
    sites: list[Site]
    calibration: Calibration | None
    bench: Workbench | None


def decide(
    model: nn.Module, request: Request, sites: list[Site], work: Work | None = None
) -> Decision:
    """Make a plan, cheap checks first: a typo must not cost a calibration.

    Args:
        sites: all of the model.
        work: what an earlier call, which was killed, has finished of this one.
    """
    check_alike(model, request.data, request.said())
    wanted = targets_among(sites, model, request)
    if request.progress and is_main():
        expect(_stages(request, files=work is not None))
    calibration, recordings = _calibrated(model, sites, wanted, request, work)
    chosen = None if work is None else work.plan()
    if chosen is None:
        with stage("decompositions"):
            fused = parted(model, sites, wanted, calibration, request)
    else:
        sizes = split_as_planned(model, chosen)
        fused = Parted(of_sites(sites, sizes), [], of_calibration(calibration, sizes), {})
    sites, calibration = fused.sites, fused.calibration
    bench = bench_of(model, calibration, request, recordings)
    if bench is not None and work is not None and work.data:
        bench.journal = work.journal
    if chosen is not None:
        resolved = resolved_for(chosen, None if isinstance(request.method, str) else request.method)
        return Decision(chosen, {}, resolved, sites, calibration, bench)
    remember = isinstance(request.data, Calibration)
    made, curves, resolved = make_plan(
        model, request, fused.wanted, calibration, bench,
        remember=remember, known=fused.curves,
    )  # fmt: skip
    plan = fused.noted(made)
    if work is not None:
        work.keep_plan(plan)
    return Decision(plan, curves, resolved, sites, calibration, bench)


def _stages(request: Request, *, files: bool) -> list[str]:
    """The stages that are to come, for the progress bar.

    Args:
        files: whether the result is written into a folder.
    """
    recovery = request.recovery
    chosen = request.rank is None and judges(request.policy or "lossaware")
    coming = {
        "calibration": request.data is not None,
        "gradients": bool(request.needs() & FISHER),
        "decompositions": True,
        "choosing ranks": chosen,
        "factoring": True,
        "refit by block": recovery is not None,
        "distillation": recovery is not None and recovery.distill_steps > 0,
        "judging": recovery is not None,
        "measuring errors": recovery is not None,
        "writing": files,
    }
    return [name for name, comes in coming.items() if comes]


def _calibrated(
    model: nn.Module,
    sites: Sequence[Site],
    wanted: Sequence[Site],
    request: Request,
    work: Work | None,
) -> tuple[Calibration | None, Recordings]:
    """The statistics that the method needs, and the inputs of blocks that were recorded for them.

    Args:
        wanted: the sites considered.
    """
    feed = Feed.of(request)
    if work is not None:
        feed = feed._replace(data=work.read(feed.data, feed.tokenizer, feed.rows))
        finished = work.statistics(model)
        if finished is not None:
            return finished, {}
    calibration = statistics_for(
        model, sites, feed,
        needed=request.method is None or bool(request.needs()),
        hold_out=hold_out_of(request, wanted),
    )  # fmt: skip
    recordings: Recordings = {}
    if calibration is not None and request.needs() & FISHER:
        with stage("gradients"):
            calibration = with_fisher(
                model, calibration, wanted, needs=request.needs(),
                seed=request.seed, progress=request.progress, recordings=recordings,
            )  # fmt: skip
    if work is not None and calibration is not None:
        calibration = work.keep_statistics(calibration, model)
    return calibration, recordings


def check_alike(model: nn.Module, data: Source, said: Mapping[str, str]) -> None:
    """Check that all processes were given the same, and a model that each can run alone.

    Data that is no finished calibration is compared when it is read.

    Raises:
        LowrankError: on every process.
    """
    if world() == 1:
        return
    check_unwrapped(model)
    rows = data.batches if isinstance(data, Calibration) else ()
    digest = "" if callable(rows) else data_print(rows)
    given = f"{type(data).__name__} {digest}".strip()
    check_same(model=model_print(model), data=given, **said)


def targets_among(sites: Sequence[Site], model: nn.Module, request: Request) -> list[Site]:
    """All sites considered; those without a reason are the targets.

    Raises:
        LowrankError: a pattern matches nothing, no target is left, or a weight is not finite.
    """
    chosen = select_sites(sites, model, request.target_modules, request.exclude_modules)
    targets = [site for site in chosen if not site.reason]
    if not targets:
        reasons = sorted({f"{site.title}: {site.reason}" for site in chosen})
        factored = sum(map(is_factored, model.modules()))
        already = f"{factored} are factored already (lowrank.to_dense undoes it); "
        raise LowrankError(
            f"no layer can be factored: {already if factored else ''}"
            f"{listed(reasons, 4) or 'the model has no dense linear layer'}"
        )
    check_rank_pattern(request.rank_pattern or {}, chosen)
    for site in targets:
        for name, tensor in site.module.named_parameters():
            if not layouts.sound(tensor):
                raise LowrankError(
                    f"{site.title}: the {name} holds NaN or Inf: load the model again, from sound "
                    f"files, or leave the layer out (exclude_modules=[{site.name!r}])"
                )
    return chosen


class Feed(NamedTuple):
    """The arguments that say what the model is run on, as for `compress`."""

    data: Source
    tokenizer: Any
    rows: int | None
    seed: int
    progress: bool

    @classmethod
    def of(cls, request: Request) -> Feed:
        return cls(*(getattr(request, name) for name in cls._fields))


def statistics_for(
    model: nn.Module, sites: Sequence[Site], feed: Feed, *, needed: bool, hold_out: float
) -> Calibration | None:
    """Calibrate on the data; "default" is self-written text if `needed` and possible, else None.

    Raises:
        LowrankError: as `calibrate`; rows are asked for, and there is no data.
    """
    data = feed.data
    if isinstance(data, str) and data == "default":
        data = SELF if needed and writes(model) else None
    if data is None:
        if feed.rows is not None:
            raise LowrankError(
                f"rows={feed.rows} counts rows of data, but no data is read: drop it"
            )
        return None
    with stage("calibration"):
        return calibrate(
            model, cast(Any, data), tokenizer=feed.tokenizer, rows=feed.rows, seed=feed.seed,
            hold_out=hold_out, progress=feed.progress, sites=sites,
        )  # fmt: skip


def resolved_for(plan: Plan, method: Given) -> Resolved:
    """The method that factors the sites of a finished plan: the object given, or by name."""
    if method is None and plan.method not in {*METHODS, *JOINT}:
        # Entries with unknown methods raise later, with the name that is missing.
        return resolve("svd", seed=plan.seed, data=True)
    resolved = resolve(method or plan.method, seed=plan.seed, storage=plan.storage, data=True)
    called = plan.settings.get("called") or [plan.method]
    return dataclasses.replace(resolved, called=tuple(called))
