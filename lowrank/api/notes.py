"""What a report says beside its figures: above all, where the data said too little."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from ..calibration.batches import Batch, rebatched
from ..calibration.statistics import Calibration, statistics_of
from ..errors import listed
from ..nn import DenseSparseLinear, LowRankMaskedLinear, SparseDenseLinear
from ..plans.plan import Plan
from .building import Built


def notes_of(built: Sequence[Built], plan: Plan, seen: Calibration | None) -> tuple[str, ...]:
    """One sentence each."""
    slow = sum(item.new is None for item in built)
    masked = sum(isinstance(item.new, LowRankMaskedLinear) for item in built)
    coded = sum(_more_work(item.new) for item in built)
    left = f"left dense because factors are not faster: {slow}; more is kept than was planned"
    source = "" if seen is None else seen.source
    forms = plan.settings.get("forms") or {}
    judged = ", ".join(
        f"{form} {away:.4g}" for form, away in sorted(forms.items(), key=itemgetter(1))
    )
    said = (
        (source, f"calibrated on {source}"),
        (slow, left),
        (forms, f"KL of the forms: {judged}"),
        (masked, f"zeros of a mask are multiplied too, so that {masked} layers are not faster"),
        (coded, f"zeros of coefficients are multiplied where tokens are many, in {coded} layers as "
                "much as in a dense one or more: these are smaller, not faster"),
    )  # fmt: skip
    found = [note for holds, note in said if holds]
    return tuple(found) if seen is None else (*found, *_on_data(built, seen))


def _more_work(new: object) -> bool:
    """Whether basis and coefficients, zeros and all, have as many entries as the dense weight."""
    if not isinstance(new, DenseSparseLinear | SparseDenseLinear):
        return False
    out, inner = new.out_features, new.in_features
    return new.rank * (out + inner) >= out * inner


def _on_data(built: Sequence[Built], seen: Calibration) -> list[str]:
    """Inputs that were zero throughout, and those with fewer vectors than directions."""
    used = [(item.site, statistics_of(item.site, seen)) for item in built if item.new is not None]
    read = [(site, stats) for site, stats in used if site.kind == "linear" and stats.count]
    grams = [(s, stats.gram) for s, stats in read if stats.gram is not None]
    zero = [s.title for s, gram in grams if float(gram.diagonal().sum()) == 0]
    share = _distinct(seen)
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


def _distinct(seen: Calibration) -> float:
    """The share of the rows that no other row repeats; 1 of a callable's."""
    if callable(seen.batches):
        return 1.0
    rows = rebatched(seen.batches, 1)
    return len({_key(row) for row in rows}) / max(len(rows), 1)


def _key(row: Batch) -> int:
    """Equal for equal rows."""
    parts = {"": row} if isinstance(row, Tensor) else row
    tensors = [v.cpu().flatten() for _, v in sorted(parts.items()) if isinstance(v, Tensor)]
    return hash(tuple(v.contiguous().view(torch.uint8).numpy().tobytes() for v in tensors))
