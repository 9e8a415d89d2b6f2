"""Lay out layer names on a grid: the kind of each layer, and its depth.

No architecture is assumed: the first number in a name is the index of the block, and the rest of
the name is the kind, shortened while it stays distinct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The cell of every name.

    Attributes:
        rows: kinds, in order of first appearance.
        columns: block indices, ascending; "" comes last, for names without one.
        cells: (row, column) indices, one per name in the order given.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]


def grid_of(names: Sequence[str]) -> Grid:
    """The grid of these names; distinct names get distinct cells."""
    split = [_split(name) for name in names]
    stems = list(dict.fromkeys(stem for stem, _ in split))
    numbers = sorted({int(number) for _, number in split if number})
    columns = [*map(str, numbers)] + [""] * any(not number for _, number in split)
    cells = [(stems.index(stem), columns.index(number)) for stem, number in split]
    return Grid(tuple(_shortened(stems)), tuple(columns), tuple(cells))


def _split(name: str) -> tuple[tuple[str, ...], str]:
    """("model", "layers", "#", "q_proj") and "3" of "model.layers.3.q_proj"."""
    parts = name.split(".") if name else ["(root)"]
    place = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if place is None:
        return tuple(parts), ""
    return (*parts[:place], "#", *parts[place + 1 :]), str(int(parts[place]))


def _shortened(stems: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest suffix of each stem that no other stem ends in."""
    plain = [tuple(part for part in stem if part != "#") or ("layer",) for stem in stems]
    labels = []
    for stem in plain:
        others = [other for other in plain if other is not stem]
        length = next(
            (n for n in range(1, len(stem)) if all(o[-n:] != stem[-n:] for o in others)), len(stem)
        )
        labels.append(".".join(stem[-length:]))
    return labels
