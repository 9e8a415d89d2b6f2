"""Figures of spectra, features, concepts, ranks, errors, size against loss (extra: matplotlib).

Every function returns a `matplotlib.figure.Figure` without window or global state:
`figure.savefig("ranks.png")`. All stay legible at a hundred layers, by growing in height.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .diagnose import Concepts, FeatureTable, Inspected, Inspection, Peek, Sensitivity
from .errors import LowrankError
from .page.grid import grid_of, ranks_text
from .plans.plan import Plan
from .plans.report import Report

# Okabe and Ito's colours, without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
SCALE = "viridis"
INCH_A_SITE = 0.17
MOST_LINES = 10  # rank curves with a legend
MOST_PANELS = 12  # kinds of layer with one panel each; beyond that, one for all
MOST_ROWS = 24  # kinds of layer in a map of ranks before experts share a row
FRONT = {"ls": "", "marker": "o", "ms": 14, "mfc": "none", "mec": "0.45", "mew": 1.2}
PER_PANEL = 50  # layers per column of dots

Series = Mapping[str, Sequence[float]]


def spectra(inspection: Inspection) -> Any:
    """Singular values against rank, one panel per kind of layer, coloured by depth.

    Of W H^½ if the inspection had data (layers that it did not reach are left out), else of W.
    Dashed: break-even rank.

    Raises:
        LowrankError: nothing was decomposed, or matplotlib is missing (as for all functions here).
    """
    # One norm per figure: with data, layers without an output spectrum are left out.
    sites = [s for s in inspection.sites if (s.output if inspection.tokens else s.weight)]
    if not sites:
        raise LowrankError("no spectrum to draw: no layer was decomposed")
    places = grid_of([site.name for site in sites], most_rows=MOST_PANELS)
    kinds: list[tuple[str, list[tuple[Inspected, int]]]] = [(name, []) for name in places.rows]
    for site, (row, column) in zip(sites, places.cells, strict=True):
        kinds[row][1].append((site, column))
    if len(kinds) > MOST_PANELS:
        kinds = [("all layers", [(site, i) for i, site in enumerate(sites)])]
    deepest = max(depth for _, members in kinds for _, depth in members)
    across = min(len(kinds), 4)
    down = math.ceil(len(kinds) / across)
    figure = _figure(3.1 * across + 1.2, 2.5 * down + 0.9)
    panels = figure.subplots(down, across, sharey=True, squeeze=False)
    colours = _scale(0, max(deepest, 1))
    for panel, (name, members) in zip(panels.flat, kinds, strict=False):
        for site, depth in members:
            values = _normalised(site)
            panel.plot(range(1, len(values) + 1), values, lw=0.9, color=colours.to_rgba(depth))
        if len({site.shape for site, _ in members}) == 1:
            panel.axvline(members[0][0].break_even, color="0.35", lw=0.8, ls="--")
        panel.set(yscale="log", ylim=(1e-4, 1.5), title=name, xlabel="rank")
        panel.grid(alpha=0.25)
    for panel in panels.flat[len(kinds) :]:
        panel.set_axis_off()
    for panel in panels[:, 0]:
        panel.set_ylabel("σ / σ₁")
    bar = figure.colorbar(colours, ax=panels, label="depth (block index)")
    bar.locator = _whole_numbers()
    of = f"outputs, W H^½, {inspection.tokens:,} tokens" if inspection.tokens else "weights W"
    figure.suptitle(f"Singular values of the {of} (dashed: break-even rank)")
    return figure


def rank_map(plan: Plan) -> Any:
    """Ranks on a grid of depth × kind, coloured by share of parameters kept.

    Where a model has many experts, those of one kind and block share a cell, with the range of
    their ranks.
    """
    if not plan.entries:
        raise LowrankError("no ranks to draw: the plan has no entries")
    places = grid_of([entry.name for entry in plan.entries], most_rows=MOST_ROWS)
    wide, high = len(places.columns), len(places.rows)
    name_width = max(map(len, places.rows)) * 0.085
    figure = _figure(max(0.42 * wide, 4.0) + name_width + 1.8, max(0.34 * high, 1.0) + 1.5)
    axes, colours = figure.subplots(), _scale(0, 1)
    for (row, column), members in places.members().items():
        found = [plan.entries[index] for index in members]
        before, after = (sum(c.params for c in costs) for costs in zip(
            *((entry.dense, entry.cost) for entry in found), strict=True
        ))  # fmt: skip
        share = min(after / max(before, 1), 1.0)
        text = ranks_text([entry.size for entry in found])
        dense = text == "–"
        axes.add_patch(_box(column, row, "0.88" if dense else colours.to_rgba(share)))
        ink = "black" if dense or share > 0.55 else "white"
        size = 8 if len(text) < 4 else 6.5
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink)
    axes.set(xlim=(-0.5, wide - 0.5), ylim=(high - 0.5, -0.5), xlabel="block index")
    axes.set_xticks(range(wide), [column or "none" for column in places.columns], fontsize=8)
    axes.set_yticks(range(high), places.rows, fontsize=8)
    axes.tick_params(length=0)
    figure.colorbar(colours, ax=axes, label="share of parameters kept")
    axes.set_title(f"Ranks, {plan.asked_text()}: {plan.kept():.3f} of the targets (–: dense)")
    return figure


def errors(report: Report) -> Any:
    """Relative error of every factored layer: planned, and measured on the stored factors."""
    sites = [site for site in report.sites if not site.reason and site.total]
    if not sites:
        raise LowrankError("no errors to draw: no layer was factored")

    def root(value: float | None, total: float | None) -> float:
        return math.nan if value is None or not total else math.sqrt(value / total)

    series = {
        "planned": [root(site.planned, site.total) for site in sites],
        "measured": [root(site.measured, site.total) for site in sites],
    }
    norms = ", ".join(sorted({site.norm for site in sites}))
    return _dots(
        [site.name or "(root)" for site in sites], series,
        title=f"Error per layer, {report.achieved:.3f} of the targets kept",
        xlabel=f"relative error, √(share of energy lost), norm: {norms}", log=False,
    )  # fmt: skip


def sensitivity(measured: Sensitivity) -> Any:
    """KL per layer when it alone is compressed, one marker per ratio."""
    series = {
        f"keeps {ratio:g}": [value if value > 0 else math.nan for value in column]
        for ratio, column in zip(measured.ratios, measured.kl.T.tolist(), strict=True)
    }
    return _dots(
        [name or "(root)" for name in measured.sites], series,
        title=f"Sensitivity: one layer alone compressed by {measured.method}",
        xlabel="KL to the dense model, nats per position", log=True,
    )  # fmt: skip


def features(table: FeatureTable) -> Any:
    """Over the depth of a model: effective ranks of features and their zeros, relative to width."""
    sites = [site for site in table.sites if site.spectrum is not None]
    shares: dict[str, list[float]] = {"eff": [], "eff σ": [], "zero": []}
    for site in sites:
        assert site.spectrum is not None
        found = (site.spectrum.effective_rank, site.spectrum.entropy_rank, site.zeros * site.width)
        for values, value in zip(shares.values(), found, strict=True):
            values.append(value / site.width)
    return _dots(
        [site.title for site in sites], shares,
        title=f"Features that layers read, {table.rows_read:,} rows of data",
        xlabel="effective rank / width; share of zeros", log=False,
    )  # fmt: skip


def peek(found: Peek) -> Any:
    """Error by number of concepts, a line per layer; dashed: its numbers shuffled."""
    if not found.sites:
        raise LowrankError("no errors to draw: no layer was reached")
    figure = _figure(7.4, 4.2)
    axes, last = figure.subplots(), max(len(found.sites) - 1, 1)
    colours, few = _scale(0, last), len(found.sites) <= MOST_LINES
    for row, name in enumerate(found.sites):
        style = {"color": colours.to_rgba(row), "lw": 1.3, "marker": "o", "ms": 3}
        axes.plot(found.counts, found.error[row].tolist(), label=name or "(root)", **style)
        style |= {"lw": 0.7, "ls": "--", "marker": ""}
        axes.plot(found.counts, found.shuffled[row].tolist(), **style)
    axes.set(xlabel="concepts", ylabel="relative error", ylim=(0, None))
    axes.set_xticks(found.counts)
    axes.grid(alpha=0.3)
    if few:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    else:
        figure.colorbar(colours, ax=axes, label="layer, in the model's order")
    axes.set_title("Features from few concepts (dashed: numbers shuffled)")
    return figure


def concepts(found: Concepts, images: Tensor, rows: int = 6) -> Any:
    """Where in the images each concept of a layer is, brightest where it is most.

    Args:
        images: (rows, channels, height, width), those that the concepts are of; any scale.
        rows: how many of them to draw.

    Raises:
        LowrankError: the layer's maps have no height and width, or are of other images.
    """
    count = found.maps.shape[-1]
    if found.maps.ndim != 4 or images.ndim != 4 or len(found.maps) != len(images):
        raise LowrankError(
            f"concepts are drawn of maps (rows, height, width, count) and as many images, got "
            f"{tuple(found.maps.shape)} and {tuple(images.shape)}"
        )
    rows, size = min(rows, len(images)), images.shape[2:]
    figure = _figure(1.25 * (count + 1) + 0.3, 1.25 * rows + 0.8)
    panels = figure.subplots(rows, count + 1, squeeze=False)
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    shown = (shown - shown.amin((2, 3), True)) / (
        shown.amax((2, 3), True) - shown.amin((2, 3), True)
    )
    most = found.maps.flatten(0, 2).amax(0).clamp(min=1e-30)
    for row in range(rows):
        panels[row, 0].imshow(shown[row].movedim(0, -1).tolist())
        for column in range(count):
            heat = (found.maps[row, ..., column] / most[column]).tolist()
            box = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
            panels[row, column + 1].imshow(heat, cmap="magma", vmin=0, vmax=1, extent=box)
    for axes in panels.flat:
        axes.set_axis_off()
    for column in range(count):
        panels[0, column + 1].set_title(f"concept {column + 1}", fontsize=8)
    figure.suptitle(f"Concepts that {found.site} reads (error {found.error:.2f})", fontsize=10)
    return figure


def ranks(history: Sequence[Mapping[str, Any]]) -> Any:
    """Ranks over the steps of a training run, a line per layer: `plots.ranks(controller.history)`.

    Ranks are constant between events; bases augmented for a few steps are left out. A layer with
    several ranks has a line for each. With more than ten lines, colour shows their order.

    Raises:
        LowrankError: no event has a rank.
    """
    lines: dict[str, list[tuple[int, int]]] = {}
    for event in history:
        if "rank" not in event or event["event"] == "augment":
            continue
        several = event["rank"] if isinstance(event["rank"], list | tuple) else None
        for number, rank in enumerate(several or [event["rank"]]):
            name = f"{event['site']} [{number}]" if several else str(event["site"])
            lines.setdefault(name, []).append((event["step"], rank))
    if not lines:
        raise LowrankError("no ranks to draw: the history has none")
    few = len(lines) <= MOST_LINES
    figure = _figure(7.4, 4.2)
    axes, colours = figure.subplots(), _scale(0, max(len(lines) - 1, 1))
    last = max(step for points in lines.values() for step, _ in points)
    end = last + max(last // 20, 1)  # show the ranks after the last event
    most = max(rank for points in lines.values() for _, rank in points)
    for number, (name, points) in enumerate(lines.items()):
        steps, sizes = zip(*points, (end, points[-1][1]), strict=True)
        colour = COLOURS[number % len(COLOURS)] if few else colours.to_rgba(number)
        style = {"ls": "--" if few and number >= len(COLOURS) else "-", "lw": 1.6 if few else 0.9}
        axes.step(steps, sizes, where="post", color=colour, label=name, **style)
    axes.set(xlabel="optimizer step", ylabel="rank", ylim=(0, 1.06 * most), xlim=(0, end))
    axes.yaxis.set_major_locator(_whole_numbers())
    axes.grid(alpha=0.3)
    if few:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    else:
        bar = figure.colorbar(colours, ax=axes, label="layer, in the model's order")
        bar.locator = _whole_numbers()
    axes.set_title(f"Ranks of {len(lines)} layers in training")
    return figure


def pareto(
    points: Iterable[tuple[str, float, float]],
    *,
    xlabel: str = "share kept",
    ylabel: str = "KL to the dense model, nats per position",
    log: bool = True,
) -> Any:
    """Size against loss; points of one name are joined, the Pareto front is ringed if some are off.

    Args:
        points: (name, size, loss) each.
        log: a logarithmic scale, where the losses differ by more than a factor of three.

    Raises:
        LowrankError: there are no points, or one is not such a triple.
    """
    every = list(points)
    sound = all(
        isinstance(p, tuple | list) and len(p) == 3 and all(map(math.isfinite, p[1:]))
        for p in every
    )
    if not every or not sound:
        raise LowrankError(f"points are (name, size, loss) with finite numbers, got {every!r:.80}")
    figure = _figure(7.5, 4.6)
    axes = figure.subplots()
    best = front([(size, loss) for _, size, loss in every])
    if len(best) < len(every):
        axes.plot(*zip(*best, strict=True), **FRONT, label="Pareto front")
    for index, name in enumerate(dict.fromkeys(p[0] for p in every)):
        own = sorted((size, loss) for other, size, loss in every if other == name)
        style = {"color": COLOURS[index % 7], "marker": MARKERS[(index + index // 7) % 7]}
        axes.plot(*zip(*own, strict=True), **style, lw=1.2, ms=5, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, title="Size against loss")
    least, most = (f(loss for _, _, loss in every) for f in (min, max))
    if log and most > 3 * least > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        if most < 20 * least:
            axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front: points that no other beats in both numbers, by rising first number."""
    front: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((size, loss))
    return front


def _dots(names: Sequence[str], series: Series, *, title: str, xlabel: str, log: bool) -> Any:
    """One line per layer, one marker per series; long lists are split into columns."""
    if not names:
        raise LowrankError("no layers to draw")
    panels = math.ceil(len(names) / PER_PANEL)
    each = math.ceil(len(names) / panels)
    wide = 3.6 + 0.075 * max(map(len, names))
    figure = _figure(wide * panels, max(each * INCH_A_SITE, 1.0) + 1.4)
    for index, axes in enumerate(figure.subplots(1, panels, sharex=True, squeeze=False).flat):
        part = slice(index * each, (index + 1) * each)
        rows = range(len(names[part]))
        for number, (label, values) in enumerate(series.items()):
            style: dict[str, Any] = {"marker": MARKERS[number % 7], "color": COLOURS[number % 7]}
            if label == "planned":  # a ring, so that equal values show both
                style |= {"ms": 7.0, "mfc": "none"}
            axes.plot(values[part], rows, ls="", **{"ms": 4.5, **style}, label=label)
        axes.set_yticks(rows, names[part], fontsize=7.5)
        axes.set(ylim=(each - 0.5, -0.5), xlabel=xlabel, xscale="log" if log else "linear")
        if not log:
            axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(series), frameon=False)
    return figure


def _normalised(site: Inspected) -> list[float]:
    assert site.chosen is not None
    values: list[float] = site.chosen.values.tolist()
    most = values[0] if values and values[0] > 0 else 1.0
    return [value / most for value in values]


def _figure(width: float, height: float) -> Any:
    _require()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _scale(least: float, most: float) -> Any:
    _require()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(least, most), SCALE)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _box(column: int, row: int, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=colour)


def _require() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise LowrankError("plots need matplotlib: pip install 'lowrank[plots]'") from error
