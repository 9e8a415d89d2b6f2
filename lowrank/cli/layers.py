"""The table of `lowrank inspect`, with the columns that fit a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ..diagnose import Inspection

ROOM = 100  # characters; --json has all columns
LEAST = ("eff σ", "cond", "stable")  # dropped in this order
MEANINGS = {
    "even": "break-even, the rank from which factors are no smaller than the dense weight",
    "rank": "of a layer that is already factored; kept: its share of the dense parameters",
    "eff": "effective rank of {of}: exp of the entropy of its energy",
    "eff σ": "the same for the singular values (Roy and Vetterli), inflated by noise",
    "stable": "stable rank: energy of {of} over that of its first direction",
    "90 %": "rank that keeps this share of the energy of {of}; likewise 95 % and 99 %",
    "cond": "condition number: largest over smallest singular value of {of}",
    "eff W": "effective rank of the weight itself",
    "ms": "time of one call at the data's shape, {timed}",
}

FEATURES = (
    "width: features that the layer reads.",
    "eff: effective rank of their covariance; eff σ: the same for its singular values.",
    "stable: stable rank; 99 %: rank that keeps this share of the variance.",
    "zero, near 0: share of numbers that are 0, or at most a hundredth of their vector's RMS.",
)


def shown(inspection: Inspection) -> list[dict[str, str]]:
    """Table rows, with the columns that fit."""
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
    """The meaning of each column, one line each."""
    of = "the outputs (W H^½)" if inspection.tokens else "the weight W"
    columns = next(iter(shown(inspection)), {})
    for column, meaning in MEANINGS.items():
        if column in columns:
            yield f"{column}: {meaning.format(of=of, timed=inspection.timed.partition(',')[0])}."
    if not inspection.tokens:
        yield "These are ranks of the weights; add --data TEXT for those of the outputs."
