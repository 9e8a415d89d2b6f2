"""What a report says beside its figures: above all, where the data said too little."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..calibration.batches import Batch, rebatched
from ..calibration.statistics import Calibration, statistics_of
from ..errors import listed
from ..nn import Form
from ..plans.plan import Plan
from ..recover.chain import Workbench
from .building import Built


def notes_of(
    built: Sequence[Built],
    plan: Plan,
    calibration: Calibration | None,
    bench: Workbench | None,
) -> tuple[str, ...]:
    """One sentence each."""
    slow = sum(item.new is None for item in built)
    source = "" if calibration is None else calibration.source
    forms = plan.settings.get("forms") or {}
    judged = ", ".join(
        f"{form} {away:.4g}" for form, away in sorted(forms.items(), key=itemgetter(1))
    )
    on_seen = bench is not None and bench.judged_on_seen and bench.judge.asked > 0
    said = (
        (source, f"calibrated on {source}"),
        (slow, f"left dense because factors are not faster: {slow}; more is kept than was planned"),
        (forms, f"KL of the forms: {judged}"),
        (on_seen, "no rows were held out: choices were judged on rows that the statistics saw"),
    )
    notes = [note for holds, note in said if holds] + _of_forms(built)
    return (*notes, *(() if calibration is None else _on_data(built, calibration)))


def _of_forms(built: Sequence[Built]) -> list[str]:
    """What each form has to say of all its layers; forms with one answer give it once."""
    layers: dict[object, list[Form]] = {}
    for item in built:
        if isinstance(item.new, Form):
            answer: Any = type(item.new).note
            layers.setdefault(answer.__func__, []).append(item.new)
    notes = (type(of_one[0]).note(of_one) for of_one in layers.values())
    return [note for note in notes if note]


def _on_data(built: Sequence[Built], calibration: Calibration) -> list[str]:
    """Inputs that were zero throughout, and those with fewer vectors than directions."""
    used = [
        (item.site, statistics_of(item.site, calibration)) for item in built if item.new is not None
    ]
    read = [(site, stats) for site, stats in used if site.kind == "linear" and stats.count]
    grams = [(s, stats.gram) for s, stats in read if stats.gram is not None]
    zero = [s.title for s, gram in grams if float(gram.diagonal().sum()) == 0]
    share = _distinct(calibration)
    few = [s.title for s, stats in read if s.title not in zero and stats.count * share < s.shape[1]]
    said = []
    if zero:
        said.append(
            f"the data gave {len(zero)} layers nothing but zeros, so that their factors are "
            f"arbitrary: {listed(zero, 3)}"
        )
    if few:
        said.append(
            f"the data gave {len(few)} layers fewer different inputs than they have features, so "
            f"that their factors are poorly determined: {listed(few, 3)}"
        )
    return said


def _distinct(calibration: Calibration) -> float:
    """The share of the rows that no other row repeats; 1 of a callable's."""
    if callable(calibration.batches):
        return 1.0
    rows = rebatched(calibration.batches, 1)
    return len({_key(row) for row in rows}) / max(len(rows), 1)


def _key(row: Batch) -> int:
    """Equal for equal rows."""
    parts = {"": row} if isinstance(row, Tensor) else row
    tensors = [v.cpu().flatten() for _, v in sorted(parts.items()) if isinstance(v, Tensor)]
    return hash(tuple(v.contiguous().view(torch.uint8).numpy().tobytes() for v in tensors))
