"""The page's figures as inline SVG; the style sheet sets the colours, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ..types import Size
from .grid import grid_of

CELL_WIDTH, CELL_HEIGHT = 38, 22
LETTER = 6.6  # approximate width of a label's letter
STEPS = 5  # shades of the rank map
MOST_KINDS = 20  # bars; the rest are merged into one


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
    """Depth × kind: the rank of every layer, shaded by the share of its parameters kept."""
    if not layers:
        return ""
    places = grid_of([layer.name for layer in layers])
    left = LETTER * max(map(len, places.rows)) + 14
    parts = []
    for row, kind in enumerate(places.rows):
        y = row * CELL_HEIGHT + 15
        parts.append(_text(left - 8, y, kind, "end"))
    for column, number in enumerate(places.columns):
        x = left + (column + 0.5) * CELL_WIDTH
        parts.append(_text(x, len(places.rows) * CELL_HEIGHT + 16, number or "none"))
    for layer, (row, column) in zip(layers, places.cells, strict=True):
        x, y = left + column * CELL_WIDTH, row * CELL_HEIGHT
        shade = "dense" if layer.size is None else f"q{min(int(layer.kept * STEPS), STEPS - 1)}"
        text = "–" if layer.size is None else ",".join(map(str, layer.size))
        parts.append(
            f'<g class="{shade}"><title>{escape(_tooltip(layer))}</title>'
            f'<rect x="{x + 1:.0f}" y="{y + 1}" width="{CELL_WIDTH - 2}" '
            f'height="{CELL_HEIGHT - 2}" rx="2"/>'
            f"{_text(x + CELL_WIDTH / 2, y + 15, text)}</g>"
        )
    width = left + len(places.columns) * CELL_WIDTH + 4
    height = len(places.rows) * CELL_HEIGHT + 22
    shades = [(f"q{n}", f"{n / STEPS:g} to {(n + 1) / STEPS:g}") for n in range(STEPS)]
    return _figure(
        "Ranks, by kind of layer and block index", width, height, parts,
        "share of parameters kept:", [*shades, ("dense", "left dense")],
    )  # fmt: skip


def errors(layers: Sequence[Layer]) -> str:
    """Relative error of every factored layer, in table order."""
    known = [(i, x) for i, x in enumerate(layers, 1) if x.size is not None]
    values = [v for _, x in known for v in (x.planned, x.measured) if v is not None]
    if not values:
        return ""
    left, high, step = 46, 150, 11 if len(known) > 40 else 18
    most = _rounded_up(max(values)) or 1.0
    parts = []
    width = left + step * len(known) + 14
    for tick in range(5):
        y = 10 + high - high * tick / 4
        parts.append(f'<line class="rule" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{most * tick / 4:.3g}", "end"))
    for place, (number, layer) in enumerate(known):
        x = left + step * (place + 0.5) + 4
        if place % (5 if step < 18 else 2) == 0:
            parts.append(_text(x, high + 26, str(number)))
        marks = [
            f'<circle class="{name}" cx="{x:.1f}" cy="{10 + high - high * value / most:.1f}" '
            f'r="{radius}"/>'
            for name, value, radius in (("planned", layer.planned, 4.5),
                                        ("measured", layer.measured, 2.5))
            if value is not None
        ]  # fmt: skip
        parts.append(f"<g><title>{escape(_tooltip(layer))}</title>{''.join(marks)}</g>")
    kinds = [("planned", "planned")]
    if any(layer.measured is not None for _, layer in known):
        kinds.append(("measured", "measured on the stored factors"))
    return _figure(
        "Relative error of the factored layers, by row number in the table", width, high + 32,
        parts, "", kinds,
    )  # fmt: skip


def sizes(layers: Sequence[Layer]) -> str:
    """Bytes by kind of layer, before and after."""
    if not layers:
        return ""
    places = grid_of([layer.name for layer in layers])
    before, after = [0] * len(places.rows), [0] * len(places.rows)
    for layer, (row, _) in zip(layers, places.cells, strict=True):
        before[row] += layer.bytes_before
        after[row] += layer.bytes_after
    bars = _merged(list(zip(places.rows, before, after, strict=True)))
    left, long = LETTER * max(len(kind) for kind, _, _ in bars) + 14, 420
    most, parts = max(max(b, a) for _, b, a in bars) or 1, []
    for row, (kind, whole, kept) in enumerate(bars):
        y = 22 * row
        tooltip = f"{kind}: {whole:,} → {kept:,} bytes"
        wide, narrow = long * whole / most, long * kept / most
        parts.append(
            f"<g><title>{escape(tooltip)}</title>{_text(left - 8, y + 15, kind, 'end')}"
            f"{_bar('before', left, y, wide)}{_bar('after', left, y, narrow)}"
            f"{_text(left + max(wide, narrow) + 8, y + 15, _sizes(whole, kept), 'start')}</g>"
        )
    return _figure(
        "Bytes by kind of layer", left + long + 190, 22 * len(bars) + 4, parts, "",
        [("before", "dense"), ("after", "kept")],
    )  # fmt: skip


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
) -> str:
    shown = "".join(
        f'<span class="key"><svg width="12" height="12" aria-hidden="true"><g class="{name}">'
        f"{_swatch(name)}</g></svg> {escape(text)}</span>"
        for name, text in keys
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="wide">'
        f'<svg role="img" aria-label="{escape(title)}" width="{width:.0f}" height="{height:.0f}">'
        f"{''.join(parts)}</svg></div>"
        f'<p class="keys">{escape(legend)} {shown}</p></figure>'
    )


def _swatch(name: str) -> str:
    if name in ("planned", "measured"):
        return f'<circle class="{name}" cx="6" cy="6" r="{4.5 if name == "planned" else 2.5}"/>'
    return f'<rect class="{name}" width="12" height="12" rx="2"/>'


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


def _bar(name: str, x: float, y: float, width: float) -> str:
    top, high = (y + 3, 16) if name == "before" else (y + 6, 10)
    return f'<rect class="{name}" x="{x:.0f}" y="{top}" width="{width:.1f}" height="{high}"/>'


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
