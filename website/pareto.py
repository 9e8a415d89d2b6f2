"""Size against loss, one dot a method and ratio, as SVG without a plotting library.

The files work alone: no fonts, scripts or styles from elsewhere; dark where the reader's system is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .figures import EQUAL_BYTES, EQUAL_PARAMETERS, KL, Figure

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 62, 190, 18, 52
# Okabe and Ito's colours, told apart by most readers; the marker's shape says the same.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#7a5fd0", "#808080")
STYLE = """
.ink { fill: #222; } .faint { stroke: #ccc; } .axis { stroke: #666; } .paper { fill: #fff; }
@media (prefers-color-scheme: dark) {
.ink { fill: #ddd; } .faint { stroke: #444; } .axis { stroke: #999; } .paper { fill: #1e2129; }
}
text { font: 12px system-ui, sans-serif; }
"""

Point = tuple[float, float]  # kept share, KL


@dataclass(frozen=True)
class Plot:
    """What one picture shows: the figures of one model, by what they share."""

    file: str
    title: str
    model: str
    settings: tuple[str, ...]
    caption: str
    x: str

    @property
    def alt(self) -> str:
        return f"{self.title}: KL to the dense model against the kept share, a line a method"

    def lines(self, measured: Sequence[Figure]) -> dict[str, list[Point]]:
        """Points of each method or effort, by rising share."""
        found: dict[str, dict[float, float]] = defaultdict(dict)
        for one in measured:
            shown = one.kind != "policies" and one.setting in self.settings
            if shown and one.measure == KL and one.model == self.model:
                name = one.name + one.setting.removeprefix(self.settings[0])
                found[name].setdefault(one.keep, one.value)
        return {name: sorted(points.items()) for name, points in found.items()}


PLOTS = (
    Plot(
        "pareto.svg",
        "Equal parameters, stories260K",
        "stories260K",
        (EQUAL_PARAMETERS,),
        "Lower is nearer to the dense model, further left is smaller. MPIFA-like and AA-SVD-like "
        "are the methods' parts as this library has them, not the authors' code.",
        "kept share of the targets' parameters",
    ),
    Plot(
        "pareto-bytes.svg",
        "Equal file bytes, embedded model",
        "embedded model",
        (EQUAL_BYTES, f"{EQUAL_BYTES}, effort fast"),
        "Indices, masks and scales counted. Integers of few bits (quantized) are far nearer than "
        "any rank at these sizes.",
        "kept share of the file's bytes",
    ),
)


def svg(plot: Plot, measured: Sequence[Figure]) -> str:
    """The picture; the loss on a logarithmic axis."""
    lines = plot.lines(measured)
    points = [point for line in lines.values() for point in line]
    shares = [share for share, _ in points]
    low = min(0.1 * math.floor(10 * min(shares) + 1e-9), min(shares))
    high = 0.1 * math.ceil(10 * max(shares) - 1e-9)
    bottom = math.log10(min(loss for _, loss in points)) - 0.1
    top = math.log10(max(loss for _, loss in points)) + 0.08

    def at(point: Point) -> Point:
        x = LEFT + (point[0] - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        height = (math.log10(point[1]) - bottom) / (top - bottom)
        return x, HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(plot.alt)}</title><style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
        *_grid(plot, (low, high), (bottom, top), at),
    ]
    ends = {name: at(line[-1])[1] for name, line in lines.items()}
    labels = spread(ends, 15)
    for index, (name, line) in enumerate(lines.items()):
        parts += _line(name, [at(point) for point in line], line, index, labels[name])
    return "\n".join([*parts, "</svg>", ""])


def _grid(plot: Plot, shares: Point, losses: Point, at) -> list[str]:  # type: ignore[no-untyped-def]
    parts = []
    right = WIDTH - RIGHT
    for power in range(math.floor(losses[0]), math.ceil(losses[1])):
        for digit in (1, 3):
            loss = digit * 10.0**power
            if not losses[0] <= math.log10(loss) <= losses[1]:
                continue
            y = at((shares[0], loss))[1]
            parts.append(f'<path class="faint" d="M{LEFT} {y:.1f}H{right}"/>')
            parts.append(
                f'<text class="ink" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">'
                f"{loss:g}</text>"
            )
    for tenth in range(round(10 * shares[0]), round(10 * shares[1]) + 1):
        x = at((tenth / 10, 1.0))[0]
        parts.append(f'<path class="axis" d="M{x:.1f} {HEIGHT - BOTTOM}v5"/>')
        parts.append(
            f'<text class="ink" x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">'
            f"{tenth / 10:g}</text>"
        )
    middle = (LEFT + right) / 2
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{right}"/>')
    parts.append(
        f'<text class="ink" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">{plot.x}</text>'
    )
    parts.append(
        f'<text class="ink" x="14" y="{HEIGHT / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {HEIGHT / 2})">KL, nats per token</text>'
    )
    return parts


def _line(
    name: str, places: Sequence[Point], values: Sequence[Point], index: int, label: float
) -> list[str]:
    colour = COLOURS[index % len(COLOURS)]
    dashes = "" if index < len(COLOURS) else ' stroke-dasharray="5 4"'
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>']
    for (x, y), (share, loss) in zip(places, values, strict=True):
        told = escape(f"{name}, {share:g} kept: KL {loss:.3g}")
        parts.append(f'<g fill="{colour}"><title>{told}</title>{marker(index, x, y)}</g>')
    x, y = places[-1]
    side = WIDTH - RIGHT + 14
    parts.append(
        f'<path d="M{x + 6:.1f} {y:.1f}L{side - 3} {label:.1f}" stroke="{colour}" '
        f'stroke-width="0.7" opacity="0.6"/>'
    )
    parts.append(f'<text class="ink" x="{side}" y="{label + 4:.1f}">{escape(name)}</text>')
    return parts


def marker(index: int, x: float, y: float) -> str:
    """A shape of its own for each of four lines in turn."""
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>',
        f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>',
        f'<path d="M{x:.1f} {y - 5.5:.1f}l5.2 9h-10.4z"/>',
        f'<path d="M{x:.1f} {y - 5.8:.1f}l5.8 5.8l-5.8 5.8l-5.8 -5.8z"/>',
    )
    return shapes[index % len(shapes)]


def spread(heights: Mapping[str, float], least: float) -> dict[str, float]:
    """Heights of labels, in the same order, none nearer than `least` to the next."""
    placed: dict[str, float] = {}
    previous = TOP - least + 6
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        previous = max(height, previous + least)
        placed[name] = previous
    beyond = max(0.0, previous - (HEIGHT - BOTTOM))
    return {name: height - beyond for name, height in placed.items()}
