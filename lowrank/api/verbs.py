"""The three verbs: `plan` decides, `apply` carries out a plan, `compress` does both."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from pathlib import Path
from typing import Any, cast

from torch import nn

from .. import io
from ..calibration.fisher import FISHER, with_fisher
from ..calibration.processes import in_step, is_main, rank, world
from ..calibration.self_written import described, writes
from ..errors import LowrankError
from ..plans.plan import Plan, matched
from ..plans.report import Report
from ..plans.stages import recording, stage
from ..recover.recovery import Recovery
from ..recover.workbench import Workbench
from ..types import JointMethod, Method
from ..walk.checks import check_model, ordinary_tensors
from ..walk.parts import parts_apart, separate_parts
from ..walk.sites import find_sites
from ..walk.surgery import copied
from .applying import carry_out
from .deciding import Feed, check_alike, decide, resolved_for, statistics_for
from .estimating import check_distillation
from .from_disk import check_apart, spilling, working_in, write
from .parting import of_calibration, split_as_planned
from .request import HOLD_OUT, Compression, Request, Source
from .resuming import Work, unfinished
from .signatures import flat


@flat(Request)
@parts_apart
def plan(model: nn.Module, request: Request) -> Plan:
    """Choose method and size for every layer, without changing the model.

    Give exactly one of ratio and rank, or a rank_pattern alone.

    Args:
        model: any nn.Module.
        …

    Returns:
        A Plan to print, edit and save; `apply` carries it out.

    Raises:
        LowrankError: an argument, the data or the model is invalid.
    """
    check_model(model)
    return decide(model, request, find_sites(model)).plan


@recording()
@ordinary_tensors()
def apply(
    model: nn.Module,
    plan: Plan,
    *,
    data: Source = "default",
    tokenizer: Any = None,
    rows: int | None = None,
    method: Method | JointMethod | None = None,
    copy: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, Report]:
    """Carry out a plan, which may have been edited or read from JSON.

    Args:
        model: changed in place and returned; if it is itself a layer, a new one is returned.
        data: calibration data, if the plan's method needs it. As for `compress`; "default"
            regenerates the text that the model wrote itself for the plan.
        method: the method object, if the plan was made with one that is not in the registry.
        tokenizer, rows, copy, progress: as for `compress`.

    Returns:
        The model and a Report.

    Raises:
        LowrankError: the plan was made for another model, or data is missing; the model is then
            unchanged.
    """
    started = time.perf_counter()
    if not isinstance(plan, Plan):
        raise LowrankError(f"apply carries out a Plan, got {plan!r:.80}; compress takes a ratio")
    check_model(model)
    check_alike(model, data, {"plan": hashlib.sha256(plan.to_json().encode()).hexdigest()})
    progress = progress and is_main()
    model = copied(model) if copy else model
    feed = Feed(data, tokenizer, rows, plan.seed, progress)
    with separate_parts(model):
        return _applied(model, plan, feed, method, started)


def _applied(
    model: nn.Module,
    plan: Plan,
    feed: Feed,
    method: Method | JointMethod | None,
    started: float,
) -> tuple[nn.Module, Report]:
    """`apply` to the model itself."""
    sizes = split_as_planned(model, plan)
    sites = find_sites(model)
    work = matched(sites, plan, model)
    resolved = resolved_for(plan, method)
    shared = {entry.name for _, entry in work if entry.group}
    makers = [
        resolved.maker(entry.method, site, grouped=entry.name in shared) for site, entry in work
    ]
    recovery = Recovery.from_json(plan.settings.get("recovery"))
    needed = any(maker.needs for maker in makers) and _wrote(model, plan, feed.rows)
    calibration = statistics_for(
        model, sites, feed, needed=needed,
        hold_out=0.0 if recovery is None else HOLD_OUT,
    )  # fmt: skip
    calibration = of_calibration(calibration, sizes)
    read = [site for (site, _), m in zip(work, makers, strict=True) if m.needs & FISHER]
    if calibration is not None and read:
        with stage("gradients"):
            asked = frozenset[str]().union(*(maker.needs for maker in makers))
            calibration = with_fisher(
                model, calibration, read, needs=asked, seed=plan.seed, progress=feed.progress
            )
    bench = None
    if recovery is not None and calibration is not None:
        bench = Workbench(model, calibration, recovery.rows)
    return carry_out(
        model, plan, sites, resolved, calibration,
        bench=bench, curves=None, started=started, progress=feed.progress,
    )  # fmt: skip


@flat(Compression)
@recording()
def compress(model: nn.Module, asked: Compression) -> tuple[nn.Module, Report]:
    """Replace layers by factored ones that keep `ratio` of their parameters.

    Give exactly one of ratio and rank, or a rank_pattern alone. Instead of a ratio, a finished plan
    is accepted, together with data, tokenizer, rows, copy, progress and a method object only.

    With several processes of torch.distributed, every one calls this with the same model, data and
    options, runs its share of the rows and decompositions, and gets the same result.

    Args:
        model: changed in place and returned; if it is itself a layer, a new one is returned. Or the
            folder of a transformers model, or its name on the hub: see `out`.
        …

    Returns:
        The model and a Report to print; of a folder the Report alone.

    Raises:
        LowrankError: an argument, the data or the model is invalid; the model is then unchanged.
    """
    started = time.perf_counter()
    if isinstance(model, str | os.PathLike):
        return cast(Any, _from_folder(model, asked))
    if asked.out is not None:
        raise LowrankError(
            "out is for a model that is given as a folder: save this one by lowrank.save"
        )
    return _compressed(model, asked, started)


def _compressed(
    model: nn.Module, asked: Compression, started: float, work: Work | None = None
) -> tuple[nn.Module, Report]:
    """Compress a model in memory.

    Args:
        work: what an earlier call, which was killed, has finished of this one.
    """
    if isinstance(asked.ratio, Plan):
        asked.check_beside_plan()
        method = cast(Any, None if isinstance(asked.method, str) else asked.method)
        return apply(
            model, asked.ratio, data=asked.data, tokenizer=asked.tokenizer, rows=asked.rows,
            method=method, copy=asked.copy, progress=asked.progress,
        )  # fmt: skip
    request = asked.request()
    check_model(model)
    model = copied(model) if asked.copy else model
    with separate_parts(model):
        return _carried_out(model, request, started, work)


def _carried_out(
    model: nn.Module, request: Request, started: float, work: Work | None
) -> tuple[nn.Module, Report]:
    """Decide and carry out in one; the calibration serves both."""
    sites = find_sites(model)
    with spilling(model, sites):
        decision = decide(model, request, sites, work)
        return carry_out(
            model, decision.plan, decision.sites, decision.resolved, decision.calibration,
            bench=decision.bench, curves=decision.curves,
            started=started, progress=request.progress,
        )  # fmt: skip


def _from_folder(source: str | os.PathLike[str], asked: Compression) -> Report:
    """Compress the model of a folder into another one."""
    if asked.out is None:
        raise LowrankError(
            f"expected a torch.nn.Module, got {type(source).__name__}: to compress the model of a "
            "folder or of the hub, say with out=… where to write the result"
        )
    source = str(source)
    out = check_apart(source, asked.out)
    if not isinstance(asked.ratio, Plan):
        asked.request()  # a typo must not cost loading
    with stage("loading"):
        model = io.from_pretrained(source).eval()
    tokenizer = asked.tokenizer or io.tokenizer_of(source)
    asked = dataclasses.replace(asked, out=None, copy=False, tokenizer=tokenizer)
    return into_folder(model, source, out, asked)


def into_folder(model: nn.Module, source: str, out: Path, asked: Compression) -> Report:
    """Compress a model with its tensors in files, resumably; see from_disk.py and resuming.py.

    Args:
        source: the folder or name that it was loaded from.
        out: a folder other than that.
    """
    started = time.perf_counter()
    if not isinstance(asked.ratio, Plan):
        check_distillation(model, asked.request())
    if world() > 1:
        return _shared_into_folder(model, source, out, asked)
    options = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)}
    with unfinished(out, model, options) as work, working_in(work.folder):
        model, report = _compressed(model, asked, started, work)
        return write(model, report, source, out, tokenizer=asked.tokenizer, within=work.folder)


def _shared_into_folder(model: nn.Module, source: str, out: Path, asked: Compression) -> Report:
    """The same by several processes, without a journal; the first one writes."""
    started = time.perf_counter()
    with working_in(out.parent):
        model, report = _compressed(model, asked, started)

        def save() -> Report:
            if not is_main():
                return report
            return write(model, report, source, out, tokenizer=asked.tokenizer)

        # The other processes go on when the files are there.
        return in_step(save)[rank()]


def _wrote(model: nn.Module, plan: Plan, rows: int | None) -> bool:
    """Whether the model can write the data that the plan was made on."""
    made_on = plan.settings.get("data")
    return writes(model) and made_on in (None, described(model, seed=plan.seed, rows=rows))
