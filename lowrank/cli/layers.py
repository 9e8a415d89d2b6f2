"""The table of `lowrank inspect`, in the columns that a terminal has room for."""

from __future__ import annotations

from collections.abc import Iterator

from ..diagnose import Inspection

ROOM = 100  # columns; the first of these give way to others: --json holds them all
LEAST = ("eff σ", "cond", "stable")
MEANINGS = {
    "even": "from this rank on two factors are no smaller than the dense weight",
    "rank": "of a layer that is factored already; kept: the share of its parameters that are left",
    "eff": "effective rank of {of}: exp of the entropy of its energy",
    "eff σ": "the same of the singular values (Roy and Vetterli), which noise inflates",
    "stable": "energy of {of} over that of its first direction",
    "90 %": "the rank that keeps this share of the energy of {of}; 95 % and 99 % too",
    "cond": "largest over smallest singular value of {of}",
    "eff W": "effective rank of the weight itself",
    "ms": "of one call at the data's shape, {timed}",
}


def shown(inspection: Inspection) -> list[dict[str, str]]:
    """Rows of the columns that there is room for."""
    columns = [
        "site", "shape", "rank", "kept", "even", "eff", "eff σ", "stable", "90 %", "95 %", "99 %",
        "cond", "eff W", "ms",
    ]  # fmt: skip
    rows = inspection.rows()
    columns = [column for column in columns if any(row[column] for row in rows)]
    for spare in LEAST:
        width = sum(2 + max(len(column), *(len(row[column]) for row in rows)) for column in columns)
        if width > ROOM and spare in columns:
            columns.remove(spare)
    return [{column: row[column] for column in columns} for row in rows]


def legend(inspection: Inspection) -> Iterator[str]:
    """What the columns mean, one line each."""
    of = "the outputs (W H^½)" if inspection.tokens else "the weight W"
    there = next(iter(shown(inspection)), {})
    for column, meaning in MEANINGS.items():
        if column in there:
            yield f"{column}: {meaning.format(of=of, timed=inspection.timed.partition(',')[0])}."
    if not inspection.tokens:
        yield "The energy of the outputs, which counts, is lower in rank: add --data TEXT."
