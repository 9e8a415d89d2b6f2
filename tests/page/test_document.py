"""The page holds what it was made from, loads nothing, and no name of a layer can break it."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import lowrank
from lowrank import LowrankError, Plan, page
from lowrank.page import figures
from tests.pictures import made
from tests.zoo import mlp, said

NASTY = '</td><script>alert("x")</script>&amp;<b>'
VOID = {"meta", "rect", "circle", "line", "wbr", "input"}


class Read(HTMLParser):
    """Tags opened, text by tag, rows of the layers' and later tables; fails where tags cross."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cell = False  # within one of a table's body
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if dict(attrs).get("id") == "layers":
            self.rows = []  # those of the figures come before
        if tag == "tr":
            self.rows.append([])
        self.cell = self.cell and tag == "wbr"
        if tag == "td" or (tag == "th" and dict(attrs).get("scope") == "row"):
            self.rows[-1].append("")
            self.cell = True

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.cell = False

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)
        if self.cell:
            self.rows[-1][-1] += data


def test_a_report_is_all_there() -> None:
    report = made(100).report
    read = Read(page.html(report))
    assert read.open == []
    rows = read.rows[1:]
    assert [row[1] for row in rows] == [entry.name for entry in report.plan.entries]
    want = {row["site"]: row for row in report.rows()}
    for number, row in enumerate(rows, 1):
        known = want[row[1]]
        assert row[0] == str(number)
        assert row[4:6] == [known["rank"], known["kept"]]
        assert row[8:] == [known["measured"], known["reason"]]
        if known["rank"]:
            assert row[7] == known["error"]
    facts = dict(zip(read.text["dt"], read.text["dd"], strict=True))
    assert facts["asked"] == "0.6 of targets"
    assert facts["bytes"] == f"{report.bytes_before:,} → {report.bytes_after:,}"
    assert facts["kept of the targets' params"] == f"{report.achieved:.4f}"
    assert facts["calibration tokens"] == "22,171"
    drawn = [attrs["class"] for tag, attrs in read.tags if tag == "circle" and "cy" in attrs]
    assert drawn.count("measured") == len(report.sites) + 1  # and one in the legend
    assert "Bytes by kind of layer" in read.text["caption"]


def test_a_plan_says_what_it_would_save() -> None:
    plan = made(14).plan
    facts = Read(page.html(plan))
    values = dict(zip(facts.text["dt"], facts.text["dd"], strict=True))
    after = plan.model.bytes - sum(e.dense.bytes - e.cost.bytes for e in plan.entries)
    assert values["bytes"] == f"{plan.model.bytes:,} → {after:,}"
    assert "measured" not in facts.text["button"]
    assert len(facts.rows[1]) == len(facts.text["button"]) == 9


def test_errors_stand_at_their_height() -> None:
    """The highest circle is the largest error; heights are linear from the zero line."""
    report = made(20).report
    text = page.html(report)
    shown = [
        float(y) for y in re.findall(r'class="measured" cx="[\d.]+" cy="([\d.]+)" r="2.5"', text)
    ]
    heights = [160 - y for y in shown if y != 6.0]
    want = [(site.measured / site.total) ** 0.5 for site in report.sites]
    assert [h / heights[0] for h in heights] == pytest.approx([w / want[0] for w in want], rel=0.01)


def test_many_layers_fit_a_desktop() -> None:
    """400 errors and 58 blocks of ranks are no wider than the page, and none is left out."""
    report = made(400).report
    read = Read(page.html(report))
    drawn = [a for tag, a in read.tags if tag == "svg" and "aria-label" in a]
    assert [float(a["width"] or 0) <= figures.WIDE for a in drawn] == [True, True]
    assert "378 of 400 layers are factored" in str(drawn[0]["aria-label"])
    circles = [a for tag, a in read.tags if tag == "circle" and "cy" in a]
    places = [float(a["cx"] or 0) for a in circles if a["class"] == "measured"][:-1]
    numbers = [n for n, e in enumerate(report.plan.entries) if e.size is not None]
    want = [n - numbers[0] for n in numbers]
    far = places[-1] - places[0]
    assert [(x - places[0]) / far * want[-1] for x in places] == pytest.approx(want, abs=0.05)
    shown = [text for text in read.text["text"] if text.isdigit()]
    assert {"0", "57", "400"} <= set(shown)


def test_experts_share_a_row_and_say_so() -> None:
    names = [f"b.{n}.{part}.{e}" for n in range(3) for part in ("up", "down") for e in range(16)]
    report = made(names=[*names, *(f"b.{n}.q" for n in range(3))]).report
    read = Read(page.html(report))
    entries = {entry.name: entry for entry in report.plan.entries}
    own = [entries[f"b.1.up.{e}"] for e in range(16)]
    ranks = [entry.size[0] for entry in own if entry.size is not None]
    kept = sum(e.cost.params for e in own) / sum(e.dense.params for e in own)
    dense = f", {16 - len(ranks)} left dense" if len(ranks) < 16 else ""
    want = f"16 layers, up.*, block 1: ranks {min(ranks)}–{max(ranks)}, keep {kept:.3f}{dense}"
    assert want in read.text["title"]
    assert [text for text in read.text["th"] if text.endswith("*")] == ["*", "*"]
    assert len(read.rows) == 1 + len(entries)  # the table has them all


def test_long_labels_are_cut_and_told_whole() -> None:
    name = "the_first_part_of_a_very_long_name_of_a_layer"
    read = Read(page.html(made(names=[f"a.0.{name}", "a.0.q"]).plan))
    cut = [text for text in read.text["text"] if "…" in text]
    assert cut == ["the_firs…g_name_of_a_layer"]
    assert len(cut[0]) == figures.LONGEST
    assert name in read.text["title"]


def test_tables_and_drawings_have_names_for_who_does_not_see_them() -> None:
    rows = [{"site": "a", "eff": "3.5"}]
    read = Read(page.html(made(20).report, {"Features": rows}))
    count = [tag for tag, _ in read.tags].count
    assert count("table") == count("caption")
    assert all("scope" in attrs for tag, attrs in read.tags if tag == "th")
    assert all(
        "aria-label" in attrs or attrs.get("aria-hidden") == "true"
        for tag, attrs in read.tags
        if tag == "svg"
    )
    for _, attrs in read.tags:
        if attrs.get("tabindex") == "0":  # what can be reached says what it is
            assert attrs["role"] == "region"
            assert attrs.get("aria-label") or attrs.get("aria-labelledby") == "title"
    labels = {attrs["for"] for tag, attrs in read.tags if tag == "label"}
    assert labels == {attrs["id"] for tag, attrs in read.tags if tag == "input"}


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb by WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_from_what_they_are_on(scheme: str) -> None:
    """4.5 to 1 for text and 3 to 1 for marks, as WCAG 2 AA asks."""
    style = (Path(page.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", light if scheme == "light" else dark))
    text = [("ink", "page"), ("soft", "page"), ("ink", "band"), ("soft", "band")]
    text += [("on-pale", f"q{n}") for n in (0, 1, 2)] + [("on-deep", f"q{n}") for n in (3, 4)]
    marks = [("planned", "page"), ("measured", "page"), ("edge", "page")]
    for pairs, least in ((text, 4.5), (marks, 3.0)):
        for one, other in pairs:
            low, high = sorted((luminance(colours[one]), luminance(colours[other])))
            assert (high + 0.05) / (low + 0.05) >= least, f"{one} on {other}"


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = page.html(made(20).report)
    read = Read(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not any({"src", "href"} & attrs.keys() for _, attrs in read.tags)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_names_are_escaped() -> None:
    report = made(names=[NASTY, "x.0." + NASTY, "\ud800", "a'b\"c"]).report
    plan = dataclasses.replace(
        report.plan,
        asked={"ratio": 0.6, "of": NASTY},
        settings={"policy": NASTY, "versions": {NASTY: 1}},
    )
    report = dataclasses.replace(report, plan=plan, notes=(NASTY,))
    read = Read(page.html(report))
    assert read.open == []
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert not any(tag == "b" for tag, _ in read.tags)
    assert NASTY in read.rows[1][1]


def test_other_tables_stand_below_the_layers(tmp_path: Path) -> None:
    rows = [{"site": NASTY, "eff": "3.5", "reason": ""}]
    page.write(made(3).plan, tmp_path / "p.html", {"Features & more": rows, "Nothing": []})
    read = Read((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert read.rows[-1] == [NASTY, "3.5"]
    assert read.open == []
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<h2>Features &amp; more</h2>" in text
    assert "<th>reason</th>" not in text
    assert "Nothing" not in text


def test_odd_names_can_be_written(tmp_path: Path) -> None:
    page.write(made(names=["\ud800"]).plan, tmp_path / "p.html")
    assert "&#55296;" in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_small_and_empty_plans() -> None:
    assert Read(page.html(made(0).plan)).rows == [[]]
    root = lowrank.plan(mlp(24, 16)[0], 0.5)
    assert "(root)" in page.html(root)
    many = made(names=[f"layer_{chr(97 + n)}" for n in range(25)]).plan
    assert "6 others" in page.html(many)


def test_plans_and_reports_are_read_back(tmp_path: Path) -> None:
    given = made(7)
    given.plan.save(tmp_path / "plan.json")
    (tmp_path / "report.json").write_text(given.report.to_json())
    assert page.read(tmp_path / "plan.json") == given.plan
    assert page.read(tmp_path / "report.json") == given.report
    assert page.read(tmp_path) == given.report


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[1, 2]", "not a lowrank plan"),
        (b'{"format": "lowrank-plan", "version": 99}', "plan version 99 is unknown"),
        (b'{"format": "lowrank-report", "version": 1}', "the report: missing field"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(LowrankError) as caught:
        page.read(path)
    assert words in said(caught)


@pytest.mark.parametrize("given", ["plan", None, 3])
def test_only_plans_and_reports_are_drawn(given: Any) -> None:
    with pytest.raises(LowrankError, match="a page shows a Plan or a Report"):
        page.html(given)


def test_numbers_beyond_all_measure_are_refused() -> None:
    plan = made(1).plan
    (one,) = plan.entries
    huge = dataclasses.replace(one.cost, params=10**400)
    broken: Plan = dataclasses.replace(plan, entries=(dataclasses.replace(one, cost=huge),))
    with pytest.raises(LowrankError, match="cannot be drawn"):
        page.html(broken)
