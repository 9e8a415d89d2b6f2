"""Entries of a plan that share one input basis: they have one rank and change together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import LowrankError, listed
from ..types import Cost, Option, Site
from .entry import Entry, check_rank

Sharers = list[Entry]  # the owner of the basis first


def member_options(group: Sequence[Site], option: Option) -> list[Option]:
    """The option of a group, split by site: the first one, the owner, bears the shared cost."""
    if option.dense:
        return [replace(option, cost=site.cost) for site in group]
    rows = sum(site.shape[0] for site in group)
    costs = [_share(option.cost, site.shape[0], rows + group[0].shape[1]) for site in group[1:]]
    rest = Cost(*(sum(cost.of(unit) for cost in costs) for unit in ("params", "bytes", "macs")))
    own = option.cost
    first = Cost(own.params - rest.params, own.bytes - rest.bytes, own.macs - rest.macs)
    return [replace(option, cost=cost) for cost in (first, *costs)]


def by_owner(entries: Sequence[Entry]) -> dict[str, Sharers]:
    """Groups by the name of their owner: the owner first, the others in the order of the plan."""
    groups: dict[str, Sharers] = {}
    for entry in entries:
        if entry.group:
            groups.setdefault(entry.group, []).append(entry)
    return {
        owner: sorted(members, key=lambda entry: entry.name != owner)
        for owner, members in groups.items()
    }


def with_rank(group: Sharers, rank: Any) -> Sharers:
    """All members at that rank; their planned errors become unknown.

    Raises:
        LowrankError: an invalid rank for the stacked rows, or one that is not smaller.
    """
    rows = sum(entry.shape[0] for entry in group)
    title = f"the rows of {listed(entry.title for entry in group)}"
    check_rank(title, (rows, group[0].shape[1]), rank)
    return [entry.sharing(rank, number == 0) for number, entry in enumerate(group)]


def left_dense(group: Sharers, reason: str) -> Sharers:
    """All members dense, and no longer a group."""
    return [replace(entry.left_dense(reason), group="") for entry in group]


def edited(entry: Entry, entries: Sequence[Entry], rank: Any, method: str, storage: str) -> Sharers:
    """An entry at another rank, with all that share its basis; rank None leaves them dense.

    Args:
        method, storage: for a site that was dense.

    Raises:
        LowrankError: an invalid rank.
    """
    reason = "left dense by hand"
    if not entry.group:
        alone = entry.left_dense(reason) if rank is None else None
        return [alone or entry.with_size(rank, method, storage)]
    group = by_owner(entries)[entry.group]
    return left_dense(group, reason) if rank is None else with_rank(group, rank)


def consistent(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries of a plan, with the costs of groups recomputed from their ranks.

    Raises:
        LowrankError: a group has no owner, or several sizes, methods or input widths.
    """
    settled: dict[str, Entry] = {}
    for owner, group in by_owner(entries).items():
        names = listed(entry.title for entry in group)
        if group[0].name != owner:
            raise LowrankError(
                f"{names}: their shared basis belongs to {owner!r}, which is not in this group"
            )
        if len({(entry.size, entry.shape[1], entry.method) for entry in group}) > 1:
            raise LowrankError(
                f"{names} share one basis: they need one size, one method and one input width, "
                f"got sizes {[entry.size for entry in group]}"
            )
        size = group[0].size
        if size is None:
            members = left_dense(group, "left dense by hand")
        else:
            members = with_rank(group, size[0] if len(size) == 1 else size)
            # An unedited group keeps its planned error.
            if [each.cost for each in members] == [each.cost for each in group]:
                members = group
        settled.update({each.name: each for each in members})
    return tuple(settled.get(entry.name, entry) for entry in entries)


def _share(cost: Cost, part: int, whole: int) -> Cost:
    return Cost(*(getattr(cost, unit) * part // whole for unit in ("params", "bytes", "macs")))
