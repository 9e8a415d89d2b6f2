"""What a compression would take, before it is run: parameters, memory, disk, FLOPs and time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from .. import io
from ..calibration.batches import LENGTH, ROWS
from ..calibration.outline import outlined
from ..calibration.self_written import COUNT, writes
from ..errors import LowrankError, listed
from ..measure.rates import Rates, measured_rates
from ..methods.resolved import Resolved
from ..nn import pivoted_cost
from ..plans.estimates import Estimate, Expected
from ..plans.stages import anonymous_bytes
from ..recover.recovery import Effort, Recovery
from ..types import Cost, Method, Policy, Site, Storage, Unit
from ..walk.checks import check_module
from ..walk.layouts import matrix
from ..walk.parts import parts_apart, separate_parts
from ..walk.sites import ALL_LINEAR, Patterns, find_sites, select_sites
from .footprint import distillation_bytes, peak_bytes, scratch_bytes
from .from_disk import GIB, available_memory
from .jobs import Job, job_of
from .request import Of, Request
from .signatures import flat
from .workload import stage_works


@dataclass(frozen=True, eq=False)
class Estimating:
    """The arguments of `estimate`."""

    ratio: float | None = None
    rank: int | float | None = field(default=None, kw_only=True)
    method: str | Method | None = field(default=None, kw_only=True)
    policy: str | Policy | None = field(default=None, kw_only=True)
    effort: str | Recovery | Effort | None = field(default=None, kw_only=True)
    of: Of = field(default="targets", kw_only=True)
    unit: Unit = field(default="params", kw_only=True)
    target_modules: Patterns = field(default=ALL_LINEAR, kw_only=True)
    exclude_modules: Patterns | None = field(default=None, kw_only=True)
    storage: Storage | None = field(default=None, kw_only=True)
    rows: int | None = field(default=None, kw_only=True)
    length: int | None = field(default=None, kw_only=True)

    def request(self) -> Request:
        own = {f.name for f in fields(Request)} - {"rows"}  # which may be 0 here: no data
        return Request(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in own})


@flat(Estimating)
def estimate(model: nn.Module, asked: Estimating) -> Estimate:
    """What `compress` would take, without running it and without reading a weight.

    `rows=0` stands for no data; by default the model is taken to write its own.

    Time follows from a short measurement of this machine, a few seconds long, and holds for it as
    busy as it is now. Stages whose work depends on the data or the disk are not estimated.

    Args:
        model: any nn.Module, or the folder of a transformers model, of which the config is enough.
        …

    Returns:
        An Estimate to print.

    Raises:
        LowrankError: an argument is invalid, or the folder is none of a dense transformers model.
    """
    return estimated(model, asked.request(), asked.rows, asked.length)


def estimated(
    source: nn.Module | str | os.PathLike[str],
    request: Request,
    rows: int | None = None,
    length: int | None = None,
) -> Estimate:
    """`estimate` of a finished request."""
    files = isinstance(source, str | os.PathLike)
    model = io.skeleton(source) if isinstance(source, str | os.PathLike) else source
    check_module(model)
    with separate_parts(model):
        return _estimated(model, request, rows, length, files)


def _estimated(
    model: nn.Module, request: Request, rows: int | None, length: int | None, files: bool
) -> Estimate:
    written = rows is None
    rows, length = _data(model, request, rows, length)
    sites = find_sites(model)
    targets = _targets(model, sites, request, request.resolved(data=rows > 0))
    weights = {id(p): p for p in model.parameters()}.values()
    params, targeted = sum(p.numel() for p in weights), sum(site.cost.params for site in targets)
    share = _share(request, params, targeted)
    outline = outlined(model, [site for site in sites if site.kind != "embedding"], length)
    job = job_of(model, targets, outline, request, rows, length, share, files)
    rates = _rates(model, targets)
    stages = [
        Expected(name, *((None, None) if work is None else (work.flops, work.seconds(rates))))
        for name, work in stage_works(job).items()
    ]
    from_disk, in_memory = peak_bytes(job, anonymous_bytes())  # libraries are warm by now
    saved, saved_bytes = _saved(job, request, share)
    return Estimate(
        model=type(model).__name__,
        layers=len(targets),
        params=params,
        targeted=targeted,
        kept=params - saved,
        rows=rows,
        length=length,
        from_disk=from_disk,
        in_memory=in_memory,
        available=available_memory(),
        scratch=scratch_bytes(job),
        output=sum(p.numel() * p.dtype.itemsize for p in weights) - saved_bytes,
        stages=tuple(stages),
        notes=_notes(job, request, written and rows > 0),
    )


@parts_apart
def check_distillation(model: nn.Module, request: Request, rows: int = 2 * ROWS) -> None:
    """Check that memory suffices for distillation, the one stage that takes all layers at once.

    Args:
        rows: of data, at least.

    Raises:
        LowrankError: it does not; what it needs is said.
    """
    recovery = request.recovery
    if recovery is None or not recovery.distill_steps or request.ratio is None:
        return
    sites = find_sites(model)
    targets = _targets(model, sites, request, request.resolved(data=True))
    rows, length = _data(model, request, rows, None)
    params = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    share = _share(request, params, sum(site.cost.params for site in targets))
    outline = outlined(model, [site for site in sites if site.kind != "embedding"], length)
    job = job_of(model, targets, outline, request, rows, length, share, files=True)
    needed, available = distillation_bytes(job), available_memory()
    if needed > available:
        raise LowrankError(
            f"distillation trains all factors at once, which takes about {needed / GIB:.1f} GiB of "
            f"memory, and {available / GIB:.1f} GiB are available: effort='balanced' trains block "
            "by block"
        )


def _rates(model: nn.Module, targets: Sequence[Site]) -> Rates:
    """The speed of this machine on the largest of the targets."""
    widest = max(targets, key=lambda site: site.cost.params)
    weight = matrix(widest.module)
    device = "cpu" if weight.is_meta else weight.device
    return measured_rates(*widest.shape, weight.dtype, device)


def _data(
    model: nn.Module, request: Request, rows: int | None, length: int | None
) -> tuple[int, int]:
    """Rows of data and their length: those given, or of the text that the model writes itself.

    Raises:
        LowrankError: they are not positive, or the method needs data and there is none.
    """
    for name, value, least in (("rows", rows, 0), ("length", length, 1)):
        if value is not None and (isinstance(value, bool) or value < least):
            raise LowrankError(f"{name} must be an integer >= {least}, got {value!r}")
    if rows is None:
        needed = request.method is None or bool(request.needs())
        rows = COUNT if needed and writes(model) else 0
    if not rows and request.needs():
        raise LowrankError(
            f"the method needs calibration data ({listed(sorted(request.needs()))}), and "
            f"{type(model).__name__} does not write it: say how much with rows=…"
        )
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 0 else LENGTH
    return rows, min(LENGTH, most) if length is None else length


def _targets(
    model: nn.Module, sites: Sequence[Site], request: Request, resolved: Resolved
) -> list[Site]:
    """The sites that would be factored.

    Raises:
        LowrankError: there is none, or a pattern matches nothing.
    """
    chosen = select_sites(sites, model, request.target_modules, request.exclude_modules)
    targets = [site for site in chosen if not site.reason and resolved.takes(site.kind)]
    if not targets:
        reasons = sorted({f"{site.title}: {site.reason}" for site in chosen if site.reason})
        raise LowrankError(
            f"no layer can be factored: {listed(reasons, 4) or 'the method takes none of its'}"
        )
    return targets


def _share(request: Request, params: int, targeted: int) -> float:
    """Share of the targets' numbers that is kept, 1 where that depends on the data.

    Raises:
        LowrankError: the ratio of the model leaves nothing of the targets.
    """
    if request.ratio is None:
        return 1.0
    share = request.ratio
    if request.of == "model":
        share = (share * params - (params - targeted)) / targeted
    if not share > 0:
        raise LowrankError(
            f"ratio {request.ratio} of the model cannot be reached: its targets hold "
            f"{targeted:,} of {params:,} parameters"
        )
    return share


def _saved(job: Job, request: Request, share: float) -> tuple[int, int]:
    """Numbers and bytes by which the targets become smaller."""
    numbers = saved = 0
    for layer in job.layers:
        dense = layer.outputs * layer.inputs
        sizes = layer.outputs, layer.inputs, layer.rank
        pivoted = request.storage == "pivoted"
        own = layer.rank * (layer.outputs + layer.inputs)
        stored = pivoted_cost(*sizes, itemsize=job.itemsize) if pivoted else Cost(own, 0, own)
        order = max(stored.bytes - job.itemsize * stored.params, 0)
        kept = stored.params if isinstance(request.rank, int) else int(share * dense)
        if kept < dense:  # else the layer stays dense
            numbers += dense - kept
            saved += (dense - kept) * job.itemsize - order
    return numbers, saved


def _notes(job: Job, request: Request, written: bool) -> tuple[str, ...]:
    """What is not known, one sentence each."""
    notes = []
    if written:
        notes.append("the time to write the text, which the model does itself, is not estimated")
    if not job.outline.traced:
        notes.append(
            "the model could not be followed on token ids: its layers count at every token, "
            "and nothing else does"
        )
    if isinstance(request.rank, float):
        notes.append("how much a share of energy keeps depends on the data: all is counted")
    if not job.closed:
        notes.append("the method does not take one decomposition a layer: its work is not known")
    if job.recovery is not None and job.recovery.minutes is not None:
        notes.append(
            f"training ends {job.recovery.minutes:g} minutes after the start: its time above is of "
            "the usual steps"
        )
    if request.effort is not None and job.recovery is None:
        notes.append("without data nothing is recovered")
    return tuple(notes)
