"""The roster: one row per method, its traits as arguments; the suite crosses laws with rows."""

from __future__ import annotations

from lowrank.testing import Law, laws

ROSTER: dict[str, dict[str, Law]] = {
    "svd": laws(),
    "whitened": laws(),
    "frequency": laws(),
    "head-aware": laws(),
    "random": laws(planted=None),  # it gives the trained weight up
}
