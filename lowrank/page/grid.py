"""Lay out layer names on a grid: the kind of each layer, and its depth.

No architecture is assumed: the first number in a name is the index of the block, and the rest of
the name is the kind, shortened while it stays distinct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..types import Size


@dataclass(frozen=True)
class Grid:
    """The cell of every name.

    Names that stand in one row and column share a cell.

    Attributes:
        rows: kinds, in order of first appearance.
        columns: block indices, ascending; "" comes last, for names without one.
        cells: (row, column) indices, one per name in the order given.
    """

    def members(self) -> dict[tuple[int, int], list[int]]:
        """The positions of the names in every cell that has any."""
        found: dict[tuple[int, int], list[int]] = {}
        for position, cell in enumerate(self.cells):
            found.setdefault(cell, []).append(position)
        return found

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]


def grid_of(names: Sequence[str], *, most_rows: int | None = None) -> Grid:
    """The grid of these names; distinct names get distinct cells, unless `most_rows` forbids it.

    Args:
        most_rows: with more kinds than this, those that differ only in a further number (the
            experts of a mixture) share a row, and "*" stands for the number.
    """
    split = [_split(name) for name in names]
    if most_rows is not None and len({stem for stem, _ in split}) > most_rows:
        split = [(_numberless(stem), number) for stem, number in split]
    stems = list(dict.fromkeys(stem for stem, _ in split))
    numbers = sorted({int(number) for _, number in split if number})
    columns = [*map(str, numbers)] + [""] * any(not number for _, number in split)
    rows = {stem: row for row, stem in enumerate(stems)}
    places = {number: column for column, number in enumerate(columns)}
    cells = [(rows[stem], places[number]) for stem, number in split]
    return Grid(tuple(_shortened(stems)), tuple(columns), tuple(cells))


def ranks_text(sizes: Sequence[Size | None]) -> str:
    """The ranks in one cell: "64", "8–24" where they differ, "–" where all layers are dense."""
    known = sorted(size for size in sizes if size is not None)
    if not known:
        return "–"
    least, most = (",".join(map(str, size)) for size in (known[0], known[-1]))
    return least if least == most else f"{least}–{most}"


def _numberless(stem: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("*" if part.isascii() and part.isdigit() else part for part in stem)


def _split(name: str) -> tuple[tuple[str, ...], str]:
    """("model", "layers", "#", "q_proj") and "3" of "model.layers.3.q_proj"."""
    parts = name.split(".") if name else ["(root)"]
    place = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if place is None:
        return tuple(parts), ""
    return (*parts[:place], "#", *parts[place + 1 :]), str(int(parts[place]))


def _shortened(stems: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest suffix of each stem that no other ends in; each "*" is in it, but not first."""
    plain = [tuple(part for part in stem if part != "#") or ("layer",) for stem in stems]
    labels = []
    for stem in plain:
        others = [other for other in plain if other is not stem]
        length = next(
            (
                n
                for n in range(1, len(stem))
                if "*" not in stem[: 1 - n or None] and all(o[-n:] != stem[-n:] for o in others)
            ),
            len(stem),
        )
        labels.append(".".join(stem[-length:]))
    return labels
