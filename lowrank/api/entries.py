"""What a plan says of one site: the chosen option, or why it stays dense."""

from __future__ import annotations

from ..methods.resolved import own_form
from ..plans.entry import Entry, break_even
from ..types import Curve, Option, Site
from ..walk import layouts
from .request import Request


def entry_of(
    site: Site,
    option: Option | None,
    curve: Curve | None,
    request: Request,
    stack: Site,
    repeats: int = 1,
) -> Entry:
    """A target's entry, or that of a site without a curve.

    Args:
        stack: the group whose curve it is, or the site itself.
        repeats: costs count so many positions.
    """
    option = option or Option("dense", None, "dense", site.cost, 0.0)
    return Entry(
        sites=site.names,
        shape=site.shape,
        dense=site.cost,
        method=option.method,
        size=option.size,
        storage=option.storage,
        cost=option.cost,
        error=option.error,
        total=None if curve is None else curve.total,
        norm="" if curve is None else curve.norm,
        target=True,
        rcond=None if curve is None else _rcond(curve),
        reason=site.reason if curve is None else _why_dense(option, stack, curve, request),
        kind=site.kind,
        heads=layouts.head_count(site.modules),
        group="" if stack is site or option.dense else stack.name,
        repeats=repeats,
    )


def _why_dense(option: Option, site: Site, curve: Curve, request: Request) -> str:
    if not option.dense:
        return ""
    largest, rank = break_even(site.shape, *request.stored(site)) - 1, request.rank
    form = own_form(request.method)
    if len(curve.options) == 1:
        sizes = "size of this form" if form else "rank"
        return f"no {sizes} makes a weight of this shape smaller"
    if isinstance(rank, float):
        size = "a size that" if form else f"a rank above {largest}, which"
        return f"keeping {rank} of its energy takes {size} is not smaller"
    if rank is not None and rank > largest:
        return f"at rank {rank} it would not be smaller; the largest that is: {largest}"
    if request.align is not None and largest < request.align:
        return f"no multiple of {request.align} makes it smaller; the largest rank is {largest}"
    return "not in rank_pattern" if request.ratio is None else "the policy keeps it dense"


def _rcond(curve: Curve) -> float | None:
    if curve.spectrum is None or not len(curve.spectrum):
        return None
    most = float(curve.spectrum[0])
    return float(curve.spectrum[-1]) / most if most > 0 else 0.0
