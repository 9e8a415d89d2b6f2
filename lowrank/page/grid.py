"""Names of layers on a map: what kind of layer each is, and how deep it stands.

Nothing is known of architectures: the first number in a name says where in a row of equal blocks
a layer stands, and the rest of the name is its kind, shortened as far as it stays distinct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Where every name stands.

    Attributes:
        rows: kinds, in the order of their first appearance.
        columns: the numbers that occur, ascending; "" comes last, for names without one.
        cells: (row, column) as indices, one for every name in the order given.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]


def grid_of(names: Sequence[str]) -> Grid:
    """Distinct names get distinct cells."""
    parted = [_parted(name) for name in names]
    stems = list(dict.fromkeys(stem for stem, _ in parted))
    numbers = sorted({int(number) for _, number in parted if number})
    columns = [*map(str, numbers)] + [""] * any(not number for _, number in parted)
    cells = [(stems.index(stem), columns.index(number)) for stem, number in parted]
    return Grid(tuple(_shortened(stems)), tuple(columns), tuple(cells))


def _parted(name: str) -> tuple[tuple[str, ...], str]:
    """("model", "layers", "#", "q_proj") and "3" of "model.layers.3.q_proj"."""
    parts = name.split(".") if name else ["(root)"]
    place = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if place is None:
        return tuple(parts), ""
    return (*parts[:place], "#", *parts[place + 1 :]), str(int(parts[place]))


def _shortened(stems: Sequence[tuple[str, ...]]) -> list[str]:
    """The shortest ending of each stem that no other stem has."""
    plain = [tuple(part for part in stem if part != "#") or ("layer",) for stem in stems]
    labels = []
    for stem in plain:
        others = [other for other in plain if other is not stem]
        length = next(
            (n for n in range(1, len(stem)) if all(o[-n:] != stem[-n:] for o in others)), len(stem)
        )
        labels.append(".".join(stem[-length:]))
    return labels
