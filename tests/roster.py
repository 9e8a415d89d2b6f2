"""The roster: one row per method, its traits as arguments; the suite crosses laws with rows."""

from __future__ import annotations

from lowrank.testing import JOINT_LAWS, Law, laws, low_rank_weight

ROSTER: dict[str, dict[str, Law]] = {
    "svd": laws(),
    "whitened": laws(),
    "two-sided": laws(),
    "asvd": laws(),
    "fwsvd": laws(),
    "snmf": laws(planted=low_rank_weight(2, positive=True)),
    "frequency": laws(),
    "head-aware": laws(),
    "random": laws(planted=None),  # it gives the trained weight up
}

JOINT_ROSTER = {"basis-sharing": JOINT_LAWS}
