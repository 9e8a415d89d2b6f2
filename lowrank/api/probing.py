"""How far an allocation takes the model from the dense one: the judge of policies and of forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..calibration.batches import ROWS
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError
from ..measure.eval import NotFinite
from ..methods.resolved import Resolved
from ..plans.entry import Entry
from ..recover.chain import Workbench
from ..recover.run import recover_layers
from ..types import Allocation, Probe, Site
from ..walk.surgery import put, twin
from .entries import entry_of
from .grouping import Group
from .request import Request

PROBED = 96  # rows that a candidate's closed-form recovery is fitted to: enough to compare by


def workbench(
    model: nn.Module, calibration: Calibration | None, request: Request
) -> Workbench | None:
    """Where what is tried can be fitted and judged; None where there are no rows to run."""
    if calibration is None or callable(calibration.batches):
        return None
    recovery = request.recovery
    return Workbench(model, calibration, ROWS if recovery is None else recovery.rows)


def probe_of(
    bench: Workbench,
    groups: Mapping[tuple[str, ...], Group],
    resolved: Resolved,
    request: Request,
) -> Probe:
    """Held-out KL of the model with an allocation.

    All happens in a twin. Where recovery follows, its closed form does here too: what is better
    before it need not be after.

    Args:
        groups: by the names that an allocation gives them.
    """
    recovery = request.recovery
    closed = recovery and replace(recovery, block_steps=0, distill_steps=0)

    def tried(allocation: Allocation) -> list[tuple[Site, Entry, nn.Module]]:
        work = []
        for names, group in groups.items():
            option = allocation[names]
            if not option.dense:
                stats = statistics_of(group[0], bench.calibration)
                new = resolved.factor(group, option, stats)
                work += [
                    (site, _entry(site, allocation, names, request), module)
                    for site, module in zip(group, new, strict=True)
                ]
        return work

    def probe(allocation: Allocation) -> float:
        work = tried(allocation)
        modules = {site.name: new for site, _, new in work}
        if closed is not None and work:
            few = max(PROBED // closed.rows, 1)
            modules = recover_layers(
                bench, work, closed, resolved, most=few, progress=False
            ).modules
        lean = twin(bench.model)
        for site, _, _ in work:
            put(lean, site, modules[site.name])
        try:
            return bench.judge.judged(lean)
        except NotFinite:
            raise
        except LowrankError as error:
            raise LowrankError(f"{error}; policy='uniform' compares nothing") from None

    return probe


def _entry(site: Site, allocation: Allocation, names: tuple[str, ...], request: Request) -> Entry:
    return entry_of(site, allocation[names], None, request, site)
