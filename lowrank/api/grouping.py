"""Group the sites that a joint method factors together."""

from __future__ import annotations

from collections.abc import Sequence

from ..calibration.statistics import Calibration
from ..types import JointMethod, Site
from ..walk import layouts

Group = tuple[Site, ...]  # the owner of the shared basis first; a single site is a group of one


def groups_of(
    targets: Sequence[Site], method: JointMethod, calibration: Calibration
) -> list[Group]:
    """Group the targets that read the same tensor at every call.

    The first in call order owns the basis; the others follow in the model's order. Members share
    block, device and dtype, so that the basis is available wherever it is read.
    """
    observed = calibration.observation.groups
    reads = {name: i for i, names in enumerate(observed) for name in names}
    turns = {name: turn for names in observed for turn, name in enumerate(names)}
    together: dict[object, list[Site]] = {}
    for site in targets:
        weight = layouts.matrix(site.module)
        place = (_block(site.name, calibration), site.shape[1], weight.dtype, weight.device)
        joins = site.kind in method.kinds and site.name in reads
        key = (reads[site.name], *place) if joins else site.name
        together.setdefault(key, []).append(site)
    groups = []
    for members in together.values():
        owner = min(members, key=lambda site: turns.get(site.name, 0))
        groups.append((owner, *(site for site in members if site is not owner)))
    return groups


def _block(name: str, calibration: Calibration) -> str:
    """The block of a chain that contains the site; "" for none."""
    blocks = [block for chain in calibration.observation.chains for block in chain]
    return next((block for block in blocks if name.startswith(f"{block}.")), "")
