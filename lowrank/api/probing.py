"""How far an allocation takes the model from the dense one: the judge of policies and of forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from .. import linalg
from ..calibration.batches import ROWS, rebatched
from ..calibration.statistics import Calibration, statistics_of
from ..errors import LowrankError
from ..measure.eval import NotFinite, judged
from ..methods import for_kind
from ..recover.run import recover
from ..types import Allocation, JointMethod, Method, Option, Probe, Site
from ..walk.surgery import put, twin
from .entries import entry_of
from .grouping import Group
from .request import Request

PROBED = 96  # rows that a candidate's closed-form recovery is fitted to: enough to compare by


def probe_of(
    model: nn.Module,
    groups: Mapping[tuple[str, ...], Group],
    way: Method,
    shared: JointMethod | None,
    seen: Calibration | None,
    request: Request,
) -> Probe | None:
    """Held-out KL of the model with an allocation; None where there is nothing to judge by.

    Rows of the statistics serve where none was held out. All happens in a twin. Where recovery
    follows, its closed form does here too: what is better before it need not be after.
    """
    if seen is None or callable(seen.batches) or any(g[0].name == "" for g in groups.values()):
        return None
    held = seen.held_out or rebatched(seen.batches)[-2:]
    few = replace(seen, batches=rebatched(seen.batches)[: max(PROBED // ROWS, 1)])

    def probe(allocation: Allocation) -> float:
        work = [
            (site, entry_of(site, allocation[names], None, request, True, site), new)
            for names, group in groups.items()
            if not allocation[names].dense
            for site, new in _tried(group, allocation[names], way, shared, seen)
        ]
        modules = {site.name: new for site, _, new in work}
        if request.recovery is not None and work:
            closed = replace(request.recovery, block_steps=0, distill_steps=0)
            damp = getattr(way, "damp", linalg.DAMP)
            made = recover(model, work, few, closed, lambda _: way, damp=damp, progress=False)
            modules = made.modules
        lean = twin(model)
        for site, _, _ in work:
            put(lean, site, modules[site.name])
        try:
            return judged(lean, model, held)
        except NotFinite:
            raise
        except LowrankError as error:
            raise LowrankError(f"{error}; policy='uniform' compares nothing") from None

    return probe


def _tried(
    group: Group, option: Option, way: Method, shared: JointMethod | None, seen: Calibration
) -> list[tuple[Site, nn.Module]]:
    """The members of a group with their layers at that option."""
    stats = statistics_of(group[0], seen)
    with torch.no_grad():
        if shared is not None and len(group) > 1:
            new = list(shared.factor([site.module for site in group], option, stats))
        else:
            new = [for_kind(way, group[0].kind).factor(group[0].module, option, stats)]
    return list(zip(group, new, strict=True))
