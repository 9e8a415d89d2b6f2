"""The site: every name has a page, every figure a file, every link a target, and the doors open."""

from __future__ import annotations

import copy
import json
import posixpath
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lowrank import demo
from lowrank.nn import FACTORED
from tests.test_docs import FENCE, ROOT, blocks, read, shape, tiny  # noqa: F401
from website import engines, figures, limits, links, pages, pareto, texts
from website.assemble import configuration, linked, written
from website.figures import Figure
from website.names import Name, names

NAMES = list(names())
GUIDE = ROOT / "docs" / "guide"


@pytest.fixture(scope="module")
def site() -> dict[str, str | Path]:
    return written()


def called(name: Name) -> str:
    return f"{name.kind}/{name.name}"


@pytest.mark.parametrize("name", NAMES, ids=called)
def test_every_name_has_a_page_text(name: Name) -> None:
    """If this fails, its message is the file to write."""
    text = texts.read(name)
    assert set(text.forms) <= set(FACTORED), f"forms that do not exist: {text.forms}"


def test_no_page_text_is_left_of_a_name_that_is_gone() -> None:
    there = {path.relative_to(texts.TEXTS) for path in texts.TEXTS.glob("*/*.md")}
    assert there == {texts.path_of(name).relative_to(texts.TEXTS) for name in NAMES}


def test_a_missing_page_text_says_what_to_write() -> None:
    name = Name("methods", "halves", FACTORED["LowRankLinear"])
    with pytest.raises(texts.TextError) as raised:
        texts.read(name)
    said = str(raised.value)
    assert "docs/gallery/methods/halves.md" in said
    assert "lowrank/methods/__init__.py" in said
    assert all(f"- {field}: <" in said for field in ("Formula", "Paper", "Claim", "Forms"))
    assert "## When to use" in said
    with pytest.raises(texts.TextError, match="left over"):  # what is pasted unread is refused
        texts.parse(name, said.partition(":\n\n")[2])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("# uniform", "# uniforms", "first line"),
        ("Every layer\nkeeps half.", "", "idea is missing"),
        ("- Paper: none\n", "", "got Formula, Claim"),
        ("- Paper: none", "- Paper:", "nothing is said for Paper"),
        ("## When not to", "## Never", "expected When to use, When not to"),
        ("At times.", "", "nothing is said for When to use"),
        ("At times.", "TODO", "left over"),
    ],
)
def test_an_incomplete_page_text_is_refused(old: str, new: str, said: str) -> None:
    name = next(name for name in NAMES if name.name == "uniform")
    text = (
        "# uniform\n\nEvery layer\nkeeps half.\n\n- Formula: `a\n  = b`\n- Paper: none\n"
        "- Claim: none\n\n## When to use\n\nAt times.\n\n## When not to\n\nElse.\n"
    )
    whole = texts.parse(name, text)
    assert whole.idea == "Every layer keeps half."
    assert whole.fields == {"Formula": "`a = b`", "Paper": "none", "Claim": "none"}
    assert whole.sections == {"When to use": "At times.", "When not to": "Else."}
    assert old in text
    with pytest.raises(texts.TextError, match=re.escape(said)):
        texts.parse(name, text.replace(old, new))


def test_figures_are_those_of_the_files() -> None:
    """Of names that exist, with a commit beside them; and one of each kind of file by hand."""
    found = figures.figures()
    registered = {(name.kind, name.name) for name in NAMES}
    assert {(one.kind, one.name) for one in found if one.kind != "rivals"} <= registered
    for file in {one.file for one in found}:
        assert json.loads(read(figures.RESULTS / file))["provenance"]["commit"]
        script = figures.READERS[file][1] if file in figures.READERS else pages.writer(file)
        assert (ROOT / script).is_file()
    rows = json.loads(read(figures.RESULTS / "quality_stories260K.json"))["rows"]
    (row,) = (r for r in rows if (r["method"], r["ratio"]) == ("whitened (SVD-LLM)", 0.6))
    (one,) = (
        one
        for one in found
        if (one.name, one.keep, one.file) == ("whitened", 0.6, "quality_stories260K.json")
    )
    assert (one.value, one.seconds, one.model) == (row["kl"], row["seconds"], "stories260K")
    rows = json.loads(read(figures.RESULTS / "resnet20.json"))["rows"]
    (row,) = (r for r in rows if (r["way"], r["keep"]) == ("tucker, uniform", 0.5))
    values = [one.value for one in found if (one.name, one.keep) == ("tucker", 0.5)]
    assert row["top1"] in values


def test_a_benchmark_may_write_figures_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "kind": "methods", "name": "svd", "model": "m", "setting": "equal parameters",
        "keep": 0.8, "measure": figures.KL, "value": 1.5, "seconds": None,
    }  # fmt: skip
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "svd.json").write_text(json.dumps({"gallery": [row]}))
    (tmp_path / "list.json").write_text("[]")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "READERS", {})
    assert figures.figures() == [Figure(**row, file="gallery/svd.json")]


def test_tools_are_those_of_the_matrix() -> None:
    rows = json.loads(read(figures.RESULTS / "matrix.json"))
    assert {row["form"] for row in rows} == set(engines.TRIED)
    assert set(engines.TRIED.values()) <= set(FACTORED)
    found = engines.support()
    assert found["LowRankLinear"]["ONNX Runtime"] == "yes"
    assert found["LowRankLinear"]["torch.compile"] == "8 of 9"  # not a mixture in one piece
    assert found["BlastLinear"]["peft LoRA"] == "no"
    assert found["SpatialConv"]["generate"] == "not tried"  # the one such network writes no text
    served = {form for form, tools in found.items() if tools[engines.VLLM] == "yes"}
    assert served == {"LowRankLinear", "PivotedLinear", "SharedLowRankLinear"}


def test_every_page_shows_what_is_known(site: dict[str, str | Path]) -> None:
    overview = str(site["gallery/index.md"])
    for name in NAMES:
        page = str(site[f"gallery/{name.kind}/{name.slug}.md"])
        assert f"[{name.name}]({name.kind}/{name.slug}.md)" in overview
        assert texts.read(name).fields["Formula"].replace("|", "\\|") in page
        if name.docstring:
            assert name.docstring.splitlines()[0] in page
    page = str(site["gallery/methods/whitened.md"])
    values = "0.8: **1.96**, 0.6: **3.32**, 0.4: **4.84**"
    assert f"| stories260K | equal parameters | KL, nats per token | {values} | 2.09 |" in page
    assert "7.94" in page.partition("## Measured")[2]  # the paper's, beside it
    assert "| 3.81 / 5.53 / 7.86 |" in overview.replace("\u00a0", " ")
    assert "There are no figures" in str(site["gallery/forms/TiedEmbedding.md"])
    made = "pages of what makes it: [cur](../methods/cur.md), [whitened-cur]("
    assert made in str(site["gallery/forms/CURLinear.md"])
    by = "/benchmarks/results/cuttlefish.json), by `recipes/cuttlefish.py` |"
    assert by in str(site["gallery/controllers/InRank.md"])
    assert pages.table(("a|b",), [("c|d",)]) == "| a\\|b |\n| --- |\n| c\\|d |"


def test_figures_name_what_wrote_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "cuttlefish.py").touch()
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.writer("cuttlefish.json") == "recipes/cuttlefish.py"
    assert pages.writer("gallery/svd.json") == "benchmarks/gallery.py"
    measures = (figures.LOG_LOSS, figures.TOP1, figures.KL)
    assert [pages.number(1.8054, measure) for measure in measures] == ["1.805", "1.8", "1.81"]


def test_a_form_without_figures_leads_to_what_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"cur": "CURLinear", "whitened-cur": "LowRankLinear, CURLinear"}
    monkeypatch.setattr(
        texts, "read", lambda name: texts.Text("", {"Forms": made.get(name.name, "")}, {})
    )
    form = Name("forms", "CURLinear", FACTORED["CURLinear"])
    said = "[cur](../methods/cur.md), [whitened-cur](../methods/whitened-cur.md)."
    assert pages.elsewhere(form).endswith(said)
    assert pages.elsewhere(Name("controllers", "CURLinear", None)).startswith("There are no")


def test_plots_have_a_dot_for_every_figure(site: dict[str, str | Path]) -> None:
    measured = figures.figures()
    for plot in pareto.PLOTS:
        lines = plot.lines(measured)
        picture = str(site[f"gallery/{plot.file}"])
        tree = ElementTree.fromstring(picture)
        told = [e.text for e in tree.iter("{http://www.w3.org/2000/svg}title")][1:]
        want = [
            f"{name}, {share:g} kept: KL {loss:.3g}"
            for name, line in lines.items()
            for share, loss in line
        ]
        assert told == want
        assert "http" not in picture.replace("http://www.w3.org/2000/svg", "")
    shown = set(pareto.PLOTS[0].lines(measured))
    assert {"svd", "whitened", "fast", "balanced", "best"} <= shown


def test_a_plot_puts_less_loss_lower_and_less_size_to_the_left() -> None:
    def figure(name: str, keep: float, value: float) -> Figure:
        return Figure(
            "methods", name, "stories260K", figures.EQUAL_PARAMETERS, keep, figures.KL, value, "f"
        )

    measured = [figure("a", 0.4, 1.0), figure("a", 0.8, 0.1), figure("b", 0.8, 0.01)]
    picture = pareto.svg(pareto.PLOTS[0], measured)
    places = [
        tuple(map(float, place))
        for place in re.findall(r'(?:cx|x)="([\d.]+)" (?:cy|y)="([\d.]+)" (?:r|width="8)', picture)
    ]
    (x1, y1), (x2, y2), (_, y3) = places
    assert x1 < x2
    assert y1 < y2 < y3
    assert y2 - y1 == pytest.approx(y3 + 4 - y2, abs=0.2)  # decades are equal; squares are centred
    heights = pareto.spread({"a": 100.0, "b": 101.0, "c": 300.0}, 15)
    assert heights == {"a": 100.0, "b": 115.0, "c": 300.0}


def test_links_of_the_site_lead_to_pages_of_the_site(site: dict[str, str | Path]) -> None:
    """All but anchors, which mkdocs checks."""
    wrong = []
    for place, text in site.items():
        if isinstance(text, Path) or not place.endswith(".md"):
            continue
        for _, _, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", FENCE.sub("", text)):
            file = target.partition("#")[0]
            if file and "://" not in file:
                goal = posixpath.normpath(posixpath.join(posixpath.dirname(place), file))
                wrong += [] if goal in site else [f"{place}: {target}"]
    assert wrong == []
    assert all(path.is_file() for path in site.values() if isinstance(path, Path))


def test_links_that_leave_the_documentation_are_changed() -> None:
    text = (
        "[a](../CONTRIBUTING.md#x) [b](guide/faq.md) [c](../recipes) [d](../recipes/dlrm.py)\n"
        "[e](https://example.org) [f](#here) [g](gallery/README.md)\n```text\n[h](../x)\n```\n"
    )
    copied: set[str] = set()
    assert linked(text, ROOT / "docs" / "methods.md", copied) == (
        "[a](contributing.md#x) [b](guide/faq.md) c [d](files/recipes/dlrm.py)\n"
        "[e](https://example.org) [f](#here) [g](gallery/index.md)\n```text\n[h](../x)\n```\n"
    )
    assert copied == {"recipes/dlrm.py"}
    assert linked("[a](docs/guide/faq.md)", ROOT / "README.md", set()) == "[a](guide/faq.md)"


def test_the_site_needs_no_server_and_no_other_site(site: dict[str, str | Path]) -> None:
    """Its search runs in a frame of its own making, and it is dark where the reader's system is."""
    config = configuration(ROOT / "build" / "website")
    assert config["plugins"][:2] == ["search", "offline"]
    (script,) = config["extra"]["polyfills"]
    assert script in site
    assert "iframe-worker" in script  # or mkdocs-material adds one from elsewhere
    palette = config["theme"]["palette"]
    assert [each.get("scheme") for each in palette] == [None, "default", "slate"]
    assert all("toggle" in each for each in palette)  # without, the system's choice is passed over


def test_verbs_are_documented_with_the_arguments_that_they_take(
    site: dict[str, str | Path],
) -> None:
    text = str(site["reference.md"])
    assert "::: lowrank.compress\n" not in text  # its source says nothing of its arguments
    compress = text.partition("## lowrank.compress\n")[2].partition("\n## ")[0]
    assert "    ratio=None,\n" in compress
    assert "- `effort`: " in compress
    assert "**Raises**\n\n- `LowrankError`: " in compress
    assert "…" not in compress
    assert "::: lowrank.kl\n" in text
    assert "::: lowrank.train.DLRT\n" in text


def test_a_site_with_broken_links_or_foreign_files_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<link rel="stylesheet" href="s.css"><link rel="canonical" href="https://x.org/">'
        '<h1 id="top">A</h1><a href="b.html#here">b</a><a href="https://x.org">x</a>'
        '<a href="#top">top</a>'
    )
    (tmp_path / "b.html").write_text('<p id="here">B</p>')
    (tmp_path / "s.css").write_text("")
    assert links.problems(tmp_path) == []
    (tmp_path / "b.html").write_text(
        '<script src="https://cdn.org/x.js"></script>'
        '<a href="c.html">c</a><a href="a.html#no">a</a>'
    )
    assert links.problems(tmp_path) == [
        "a.html links b.html#here",
        "b.html loads https://cdn.org/x.js",
        "b.html links c.html",
        "b.html links a.html#no",
    ]
    assert links.problems(tmp_path / "none") == [f"{tmp_path / 'none'} has no page"]


def test_limits_are_those_of_bytes_and_launches() -> None:
    h200 = limits.DEVICES[0]
    bound = [round(limits.speedup(keep, h200, launches=False), 2) for keep in (0.8, 0.5)]
    assert bound == [1.23, 1.87]
    assert [round(limits.speedup(keep, h200), 2) for keep in (0.8, 0.5)] == [1.04, 1.47]
    assert limits.table() in read(GUIDE / "concepts.md")


@pytest.mark.parametrize("page", sorted(GUIDE.glob("*.svg")), ids=lambda path: path.name)
def test_drawings_stand_alone_and_are_shown(page: Path) -> None:
    tree = ElementTree.fromstring(read(page))
    assert tree.find("{http://www.w3.org/2000/svg}title") is not None
    assert "http" not in read(page).replace("http://www.w3.org/2000/svg", "")
    assert f"({page.name})" in read(GUIDE / "concepts.md")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's exporter
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_three_doors_open(
    tiny: demo.TinyLM,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a smaller model: the same lines, with other numbers, as the page shows."""
    monkeypatch.chdir(tmp_path)
    for door in read(GUIDE / "start.md").split("\n## ")[1:]:
        monkeypatch.setattr(demo, "tiny_lm", lambda: tiny._replace(model=copy.deepcopy(tiny.model)))
        kept: dict[str, Any] = {}
        for block in blocks(door, "python"):
            exec(compile(block, "start.md", "exec"), kept)
        printed = [shape(line) for line in capsys.readouterr().out.splitlines()]
        shown = [shape(line) for line in blocks(door, "text")[0].splitlines()]
        assert shown
        assert [line for line in shown if line not in printed] == []
