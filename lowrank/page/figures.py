"""The page's figures, inline; the style sheet sets the colours, light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from ..types import Size
from .grid import grid_of, ranks_text

CELL_HEIGHT = 22
LETTER = 6.6  # approximate width of a label's letter
LONGEST = 26  # letters of a label; longer ones are cut in the middle
WIDE = 1150  # what fits the page on a desktop
LEFT, HIGH = 46, 150  # of the errors: room for the scale, and the height
STEPS = 5  # shades of the rank map
MOST_KINDS = 20  # rows, and bars; the rest of the bars are merged into one


@dataclass(frozen=True)
class Layer:
    """One layer on the page; errors are relative, None if unknown."""

    name: str
    shape: tuple[int, int]
    method: str
    size: Size | None
    kept: float
    bytes_before: int
    bytes_after: int
    planned: float | None
    measured: float | None
    reason: str


def rank_map(layers: Sequence[Layer]) -> str:
    """Depth × kind: the ranks, shaded by the share of parameters kept; deep models in bands."""
    if not layers:
        return ""
    places = grid_of([layer.name for layer in layers], most_rows=MOST_KINDS)
    cells = {cell: [layers[i] for i in found] for cell, found in places.members().items()}
    texts = {cell: ranks_text([layer.size for layer in found]) for cell, found in cells.items()}
    step = int(max(LETTER * max(map(len, texts.values())) + 6, 32))
    left = LETTER * max(len(_cut(kind)) for kind in places.rows) + 14
    bands = math.ceil(len(places.columns) / max((WIDE - left) // step, 1))
    across = math.ceil(len(places.columns) / bands)
    tall = len(places.rows) * CELL_HEIGHT + 26
    parts = [
        _label(left - 8, band * tall + row * CELL_HEIGHT + 15, kind)
        for band in range(bands)
        for row, kind in enumerate(places.rows)
    ]
    for column, number in enumerate(places.columns):
        x, y = left + (column % across + 0.5) * step, (column // across + 1) * tall - 10
        parts.append(_text(x, y, number or "none"))
    for (row, column), found in cells.items():
        x, y = left + column % across * step, column // across * tall + row * CELL_HEIGHT
        where = f"{places.rows[row]}, block {places.columns[column]}"
        parts.append(_cell(x, y, step, found, texts[row, column], where))
    shades = [(f"q{n}", f"{n / STEPS:g} to {(n + 1) / STEPS:g}") for n in range(STEPS)]
    factored = sum(layer.size is not None for layer in layers)
    return _figure(
        "Ranks, by kind of layer and block index", left + across * step + 4, bands * tall, parts,
        "share of parameters kept:", [*shades, ("dense", "left dense")],
        f"{factored} of {len(layers)} layers are factored",
    )  # fmt: skip


def _cell(x: float, y: float, step: int, found: Sequence[Layer], text: str, where: str) -> str:
    """One cell of the map; several layers in it are told by their number and range."""
    whole = sum(layer.shape[0] * layer.shape[1] for layer in found)
    share = sum(layer.kept * layer.shape[0] * layer.shape[1] for layer in found) / max(whole, 1)
    dense = sum(layer.size is None for layer in found)
    shade = "dense" if dense == len(found) else f"q{min(int(share * STEPS), STEPS - 1)}"
    if len(found) == 1:
        told = _tooltip(found[0])
    else:
        some = f", {dense} left dense" if dense else ""
        told = f"{len(found)} layers, {where}: ranks {text}, keep {share:.3f}{some}"
    return (
        f'<g class="{shade}"><title>{escape(told)}</title>'
        f'<rect x="{x + 1:.0f}" y="{y + 1}" width="{step - 2}" '
        f'height="{CELL_HEIGHT - 2}" rx="2"/>{_text(x + step / 2, y + 15, text)}</g>'
    )


def errors(layers: Sequence[Layer]) -> str:
    """Relative error of every factored layer, by its row in the table; as wide as a desktop."""
    known = [(i, x) for i, x in enumerate(layers, 1) if x.size is not None]
    values = [v for _, x in known for v in (x.planned, x.measured) if v is not None]
    if not values:
        return ""
    most, step = _rounded_up(max(values)) or 1.0, min((WIDE - LEFT - 14) / len(layers), 18.0)
    width, ring, dot = LEFT + step * len(layers) + 14, *((4.5, 2.5) if step >= 6 else (3.0, 1.6))
    parts = _axes(most, step, len(layers), width)
    for number, layer in known:
        x = LEFT + step * (number - 0.5) + 4
        marks = [
            f'<circle class="{name}" cx="{x:.1f}" cy="{10 + HIGH - HIGH * value / most:.1f}" '
            f'r="{radius}"/>'
            for name, value, radius in (("planned", layer.planned, ring),
                                        ("measured", layer.measured, dot))
            if value is not None
        ]  # fmt: skip
        parts.append(f"<g><title>{escape(_tooltip(layer))}</title>{''.join(marks)}</g>")
    kinds = [("planned", "planned")]
    if any(layer.measured is not None for _, layer in known):
        kinds.append(("measured", "measured on the stored factors"))
    return _figure(
        "Relative error of the factored layers, by row number in the table", width, HIGH + 32,
        parts, "", kinds, f"from {min(values):.3g} to {max(values):.3g}",
    )  # fmt: skip


def _axes(most: float, step: float, rows: int, width: float) -> list[str]:
    """Lines at quarters of the highest error, and row numbers that do not run into each other."""
    parts = []
    for tick in range(5):
        y = 10 + HIGH - HIGH * tick / 4
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{width:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{most * tick / 4:.3g}", "end"))
    each = next(n for n in _round_numbers() if n * step >= 40)
    for number in [1, *range(each, rows + 1, each)]:
        parts.append(_text(LEFT + step * (number - 0.5) + 4, HIGH + 26, str(number)))
    return parts


def sizes(layers: Sequence[Layer]) -> str:
    """Bytes by kind of layer, before and after: text and bars that fit a phone."""
    if not layers:
        return ""
    places = grid_of([layer.name for layer in layers], most_rows=MOST_KINDS)
    before, after = [0] * len(places.rows), [0] * len(places.rows)
    for layer, (row, _) in zip(layers, places.cells, strict=True):
        before[row] += layer.bytes_before
        after[row] += layer.bytes_after
    bars = _merged(list(zip(places.rows, before, after, strict=True)))
    most, rows = max(max(b, a) for _, b, a in bars) or 1, []
    for kind, whole, kept in bars:
        drawn = "".join(
            f'<span class="{name}" style="width:{100 * value / most:.2f}%"></span>'
            for name, value in (("before", whole), ("after", kept))
        )
        rows.append(
            f'<tr><th scope="row">{broken(kind)}</th>'
            f'<td class="bar" aria-hidden="true"><div>{drawn}</div></td>'
            f'<td title="{whole:,} → {kept:,} bytes">{_sizes(whole, kept)}</td></tr>'
        )
    return (
        f'<figure><table class="bars"><caption>Bytes by kind of layer</caption>\n'
        f"<tbody>{''.join(rows)}</tbody></table>\n"
        f"{_keys('', [('before', 'dense'), ('after', 'kept')])}</figure>"
    )


def broken(name: str) -> str:
    """A layer's name, escaped, that a narrow screen may break after each dot."""
    return escape(name).replace(".", ".<wbr>")


def _merged(bars: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The largest bars, and one for all others."""
    if len(bars) <= MOST_KINDS:
        return bars
    bars = sorted(bars, key=lambda bar: -bar[1])
    rest = bars[MOST_KINDS - 1 :]
    others = (f"{len(rest)} others", sum(b for _, b, _ in rest), sum(a for _, _, a in rest))
    return [*bars[: MOST_KINDS - 1], others]


def _figure(
    title: str,
    width: float,
    height: float,
    parts: Iterable[str],
    legend: str,
    keys: Iterable[tuple[str, str]],
    told: str,
) -> str:
    """A drawing that scrolls where it is wider than the screen, by keyboard too.

    Args:
        told: what a screen reader says of the drawing, whose numbers are in the table.
    """
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(title)}">'
        f'<svg role="img" aria-label="{escape(f"{title}: {told}")}" '
        f'width="{width:.0f}" height="{height:.0f}">'
        f"{''.join(parts)}</svg></div>\n{_keys(legend, keys)}</figure>"
    )


def _keys(legend: str, keys: Iterable[tuple[str, str]]) -> str:
    shown = "".join(
        f'<span class="key"><svg width="12" height="12" aria-hidden="true"><g class="{name}">'
        f"{_swatch(name)}</g></svg> {escape(text)}</span>"
        for name, text in keys
    )
    return f'<p class="keys">{escape(legend)} {shown}</p>'


def _swatch(name: str) -> str:
    if name in ("planned", "measured"):
        return f'<circle class="{name}" cx="6" cy="6" r="{4.5 if name == "planned" else 2.5}"/>'
    return f'<rect class="{name}" x="0.5" y="0.5" width="11" height="11" rx="2"/>'


def _tooltip(layer: Layer) -> str:
    """Text shown while the pointer rests on a mark."""
    if layer.size is None:
        return f"{layer.name}: dense. {layer.reason}"
    known = (("planned", layer.planned), ("measured", layer.measured))
    shown = "".join(f", {name} {value:.4f}" for name, value in known if value is not None)
    rank = ",".join(map(str, layer.size))
    return f"{layer.name}: rank {rank}, keeps {layer.kept:.3f}{shown}"


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _cut(text: str) -> str:
    """A label of at most LONGEST letters: the end of a name tells more than its middle."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 3]}…{text[-(LONGEST - LONGEST // 3 - 1) :]}"


def _label(x: float, y: float, text: str) -> str:
    """A row's name before its cells; the whole of it while the pointer rests on it."""
    return f"<g><title>{escape(text)}</title>{_text(x, y, _cut(text), 'end')}</g>"


def _round_numbers() -> Iterator[int]:
    """5, 10, 20, 50, 100 …"""
    return (n * 10**power for power in itertools.count() for n in (5, 10, 20))


def _sizes(before: int, after: int) -> str:
    return _bytes(before) if before == after else f"{_bytes(before)} → {_bytes(after)}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _rounded_up(value: float) -> float:
    """The next axis limit (0.01, 0.02, 0.04, 0.08, 0.1, 0.2 …) whose quarters print short."""
    steps = (0.01, 0.02, 0.04, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
    return next((step for step in steps if value <= step), value)
