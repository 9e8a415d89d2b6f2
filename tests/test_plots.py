"""The pictures: what they show is what was given, at a hundred layers too; no state is left."""

from __future__ import annotations

import builtins
import dataclasses
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank import LowrankError, plots
from lowrank.diagnose import Concepts, FeatureTable, Inspection, LayerSpectrum, Peek
from lowrank.diagnose.feature_table import LayerFeatures
from tests.pictures import made

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def hundred() -> SimpleNamespace:
    return made(100)


def words(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def legible(figure: Any) -> None:
    """Drawn without a warning, titled, and no two labels of one axis overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert figure.get_suptitle() or figure.axes[0].get_title()
    for axes in figure.axes:
        boxes = [t.get_window_extent(renderer) for t in axes.get_yticklabels() if t.get_text()]
        tops = sorted((box.y0, box.y1) for box in boxes)
        assert all(a[1] <= b[0] + 1.5 for a, b in itertools.pairwise(tops))


def test_rank_map_shows_every_rank(hundred: SimpleNamespace) -> None:
    figure = plots.rank_map(hundred.plan)
    legible(figure)
    shown = words(figure)
    for entry in hundred.plan.entries:
        assert ("–" if entry.size is None else str(entry.size[0])) in shown
    assert {"q_proj", "down_proj", "14", "share of parameters kept"} <= set(shown)
    assert any("ratio 0.6" in text for text in shown)


def test_experts_share_cells_and_panels() -> None:
    names = [f"b.{n}.{part}.{e}" for n in range(2) for part in ("up", "down") for e in range(16)]
    many = made(names=names)
    figure = plots.rank_map(many.plan)
    ranks = [e.size[0] for e in many.plan.entries[16:32] if e.size is not None]
    assert {"up.*", "down.*", f"{min(ranks)}–{max(ranks)}"} <= set(words(figure))
    assert len(figure.axes[0].patches) == 4
    figure = plots.spectra(many.inspection)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["up.*", "down.*"]
    assert len(figure.axes[0].lines) == 32 + 1  # and the break-even rank


def test_dots_show_every_layer_and_value(hundred: SimpleNamespace) -> None:
    for figure, names, unit in (
        (plots.sensitivity(hundred.sensitivity), hundred.sensitivity.sites, "nats per position"),
        (plots.errors(hundred.report), [s.name for s in hundred.report.sites], "relative error"),
    ):
        legible(figure)
        shown = words(figure)
        assert set(names) <= set(shown)
        assert any(unit in text for text in shown)
    first = figure.axes[0].lines[1]
    site = hundred.report.sites[0]
    assert first.get_label() == "measured"
    assert first.get_xdata()[0] == pytest.approx((site.measured / site.total) ** 0.5)


def test_spectra_have_a_panel_for_every_kind(hundred: SimpleNamespace) -> None:
    figure = plots.spectra(hundred.inspection)
    legible(figure)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:7] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                          "down_proj"]  # fmt: skip
    site = hundred.inspection.sites[0]
    line = figure.axes[0].lines[0]
    assert line.get_ydata()[3] == pytest.approx(float((site.output.energy[3]) ** 0.5))
    assert "22,171 tokens" in figure.get_suptitle()
    mixed = Inspection((*hundred.inspection.sites, dataclasses.replace(site, output=None)), 5, "")
    assert sum(len(axes.lines) for axes in plots.spectra(mixed).axes[:7]) == 100 + 7  # and dashes
    many = made(names=[f"layer_{chr(97 + n)}" for n in range(20)])
    one = plots.spectra(many.inspection)
    assert len(one.axes[0].lines) >= 20
    legible(plots.rank_map(many.plan))


def test_the_front_is_what_no_point_beats() -> None:
    assert plots.front([(3, 1), (1, 3), (2, 2), (2, 4), (3, 2)]) == [(1, 3), (2, 2), (3, 1)]
    figure = plots.pareto([("a", 0.6, 2.0), ("a", 0.8, 1.0), ("b", 0.6, 1.5)])
    legible(figure)
    front = figure.axes[0].lines[0]
    assert list(front.get_xdata()) == [0.6, 0.8]
    assert list(front.get_ydata()) == [1.5, 1.0]
    assert {"a", "b", "Pareto front", "share kept"} <= set(words(figure))
    assert plots.pareto([("a", 0.5, 0.0)]).axes[0].get_yscale() == "linear"
    sweep = plots.pareto([("a", 0.5, 2.9), ("a", 0.8, 1.0)])  # two ticks of a logarithm say little
    assert sweep.axes[0].get_yscale() == "linear"
    assert "Pareto front" not in words(sweep)  # all points are on it
    assert plots.pareto([("a", 0.5, 3.1), ("a", 0.8, 1.0)]).axes[0].get_yscale() == "log"


def test_no_global_figure_is_made(hundred: SimpleNamespace) -> None:
    plots.rank_map(hundred.plan)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


@pytest.mark.parametrize("points", [[], [("a", 1)], [("a", 1.0, float("nan"))]])
def test_points_that_are_none_are_refused(points: Any) -> None:
    with pytest.raises(LowrankError, match="points are"):
        plots.pareto(points)


def test_nothing_to_draw_is_said() -> None:
    nothing = made(0)
    for draw, given in (
        (plots.spectra, Inspection((), 0, "")),
        (plots.rank_map, nothing.plan),
        (plots.errors, nothing.report),
        (plots.sensitivity, nothing.sensitivity),
        (plots.features, FeatureTable((), 0)),
        (plots.peek, Peek((), (1,), torch.zeros(0, 1), torch.zeros(0, 1))),
    ):
        with pytest.raises(LowrankError, match=r"^no "):
            draw(given)  # type: ignore[operator]


def test_without_matplotlib_one_sentence_says_so(
    hundred: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    for draw in (plots.rank_map, plots.errors):
        with pytest.raises(LowrankError, match=r"^plots need matplotlib: pip install"):
            draw(hundred.plan if draw is plots.rank_map else hundred.report)


def events(layers: int) -> list[dict[str, Any]]:
    """Ranks that fall from 20, one event in ten steps, with enlarged bases between."""
    made = [{"step": 0, "site": "head", "event": "left", "reason": "frozen"}]
    for number in range(layers):
        name = f"blocks.{number}.fc"
        made.append({"step": 0, "site": name, "event": "attach", "rank": 20})
        for step in range(10, 60, 10):
            rank = max(20 - step // 10 * (1 + number % 3), 2)
            made.append({"step": step - 9, "site": name, "event": "augment", "rank": 2 * rank})
            made.append({"step": step, "site": name, "event": "truncate", "rank": rank})
    return made


@pytest.mark.parametrize("layers", [1, 3, 10, 100])
def test_ranks_over_time_are_those_of_the_history(layers: int) -> None:
    figure = plots.ranks(events(layers))
    legible(figure)
    drawn = figure.axes[0].get_lines()
    assert len(drawn) == layers
    assert list(drawn[0].get_xdata()) == [0, 10, 20, 30, 40, 50, 52]
    assert list(drawn[0].get_ydata()) == [20, 19, 18, 17, 16, 15, 15]
    assert (f"blocks.{layers - 1}.fc" in words(figure)) == (layers <= 10)
    assert any(f"Ranks of {layers} layers" in text for text in words(figure))


def test_a_layer_with_two_ranks_has_two_lines() -> None:
    figure = plots.ranks([{"step": 0, "site": "conv", "event": "attach", "rank": [8, 5]}])
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["conv [0]", "conv [1]"]
    assert [list(line.get_ydata()) for line in figure.axes[0].get_lines()] == [[8, 8], [5, 5]]


def test_features_over_depth_are_shares_of_their_width() -> None:
    sites = tuple(
        LayerFeatures(f"blocks.{n}.fc", 8, 99, LayerSpectrum(torch.ones(n % 8 + 1)), zeros=n / 100)
        for n in range(60)
    )
    figure = plots.features(FeatureTable((*sites, LayerFeatures("idle", 0, reason="no data")), 3))
    legible(figure)
    rank, _, zeros = figure.axes[0].lines
    assert list(rank.get_xdata()[:9]) == pytest.approx([*(n / 8 for n in range(1, 9)), 1 / 8])
    assert zeros.get_xdata()[7] == pytest.approx(0.07)
    assert "idle" not in words(figure)


def test_peek_draws_errors_and_their_control() -> None:
    error = torch.tensor([[0.5, 0.25]]).double()
    found = Peek(("a", "b"), (1, 3), error.repeat(2, 1), error.repeat(2, 1) + 0.1)
    figure = plots.peek(found)
    legible(figure)
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines[:2]] == [
        pytest.approx([0.5, 0.25]), pytest.approx([0.6, 0.35])
    ]  # fmt: skip
    assert list(lines[0].get_xdata()) == [1, 3]
    assert {"a", "b"} <= set(words(figure))


def test_concepts_are_drawn_beside_their_images() -> None:
    maps = torch.zeros(4, 3, 3, 2)
    maps[0, 1, 1, 1] = 5
    found = Concepts("conv", maps, torch.ones(2, 6), 0.25, False)
    images = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    figure = plots.concepts(found, images, rows=3)
    legible(figure)
    assert len(figure.axes) == 3 * 3
    heat = figure.axes[2].images[0]
    assert float(heat.get_array().max()) == 1  # of the largest of that concept
    assert list(heat.get_extent()) == [-0.5, 5.5, 5.5, -0.5]
    assert figure.axes[0].images[0].get_array().shape == (6, 6, 3)
    assert "Concepts that conv reads" in figure.get_suptitle()
    for other in (images[:2], images[0]):
        with pytest.raises(LowrankError, match="as many images"):
            plots.concepts(found, other)


def test_a_history_without_ranks_has_no_picture() -> None:
    with pytest.raises(LowrankError, match="the history has none"):
        plots.ranks([{"step": 0, "site": "a", "event": "left", "reason": "frozen"}])
