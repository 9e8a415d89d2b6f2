"""The page in a real browser: sorted, filtered, on phones, by keyboard; it complains of nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowrank import page
from tests.browser import BROWSER, MISSING, Browser, Page
from tests.pictures import made

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason=MISSING)]
RANK, MEASURED = 4, 8  # columns


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    page.write(made(400).report, path, {"Features": [{"site": "a", "eff": "3.5"}]})
    return path.as_uri()


def column(shown: Page, index: int) -> list[str]:
    rows = "[...document.querySelectorAll('#layers tbody tr')].filter((row) => !row.hidden)"
    found: list[str] = shown.run(f"{rows}.map((row) => row.cells[{index}].textContent)")
    return found


def sorted_by(shown: Page) -> list[str | None]:
    heads = "[...document.querySelectorAll('#layers thead th')]"
    found: list[str | None] = shown.run(f"{heads}.map((h) => h.getAttribute('aria-sort'))")
    return found


def test_rows_stand_as_the_address_says(browser: Browser, address: str) -> None:
    shown = browser.opened(f"{address}#sort=rank,down&find=_proj")
    ranks = column(shown, RANK)
    assert len(ranks) == 400
    known = [int(rank) for rank in ranks if rank]
    assert known == sorted(known, reverse=True)
    assert ranks[len(known) :] == [""] * (400 - len(known))  # dense layers come last
    assert sorted_by(shown)[RANK] == "descending"
    assert shown.complaints == []


def test_a_click_sorts_and_a_second_one_turns_it_round(browser: Browser, address: str) -> None:
    shown = browser.opened(address)
    assert sorted_by(shown)[0] == "ascending"
    assert column(shown, 0) == [str(n) for n in range(1, 401)]
    for down in (False, True):
        shown.click("#layers thead button", MEASURED)
        errors = [float(value) for value in column(shown, MEASURED) if value]
        assert errors == sorted(errors, reverse=down)
        assert errors[0] != errors[-1]
    assert [state for state in sorted_by(shown) if state] == ["descending"]
    assert shown.run("location.hash") == "#sort=measured,down"
    shown.click("#layers thead button", 1)
    names = column(shown, 1)
    assert names.index("model.layers.10.mlp.up_proj") > names.index("model.layers.9.mlp.up_proj")
    assert len(set(names)) == 400
    assert shown.complaints == []


def test_the_keyboard_does_what_the_pointer_does(browser: Browser, address: str) -> None:
    """Tab goes through the figures to the filter and the columns, visibly; Enter and space sort."""
    shown = browser.opened(address)
    passed: list[str] = []
    for _ in range(12):
        shown.press("Tab")
        name, ring = shown.run(
            "(() => {const e = document.activeElement;"
            "return [e.getAttribute('aria-label') || e.id || e.textContent.slice(0, 20),"
            "getComputedStyle(e).outlineStyle + getComputedStyle(e).outlineWidth]})()"
        )
        passed.append(name)
        assert ring == "solid2px", name
        if name == "rank":
            break
    assert [name.split(",")[0] for name in passed] == [
        "Ranks", "Relative error of the factored layers", "find", "tall", "number",
        "layer", "shape", "method", "rank",
    ]  # fmt: skip
    for key, state, said in (("Enter", "ascending", "rising"), (" ", "descending", "falling")):
        shown.press(key)
        assert sorted_by(shown)[RANK] == state
        told = shown.run("document.querySelector('[role=status]').textContent")
        assert told == f"Sorted by rank, {said}"
    assert shown.complaints == []


def test_few_layers_are_shown_of_many(browser: Browser, address: str) -> None:
    shown = browser.opened(f"{address}#sort=kept")
    shown.click("#find")
    shown.type("Layers.57.")
    assert set(column(shown, 1)) == {f"model.layers.57.self_attn.{n}_proj" for n in "q"}
    assert shown.run("document.getElementById('count').textContent") == "1 of 400"
    assert shown.run("location.hash") == "#sort=kept&find=Layers.57."
    again = browser.opened(address + shown.run("location.hash"))
    assert column(again, 1) == column(shown, 1)
    shown.type(" no")
    assert column(shown, 1) == []
    assert shown.complaints == []


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_the_page_fits_the_screen(browser: Browser, address: str, width: int, dark: bool) -> None:
    """Only tables and drawings scroll sideways, and 400 rows do not make the page endless."""
    shown = browser.opened(address, width=width, dark=dark)
    across, down = shown.run(
        "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    )
    assert across == width
    assert down < 3000
    paper = shown.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark
    cut = shown.run(
        "[...document.querySelectorAll('h1, h2, dt, dd, p, caption, label, .bars td')]"
        ".filter((e) => e.className !== 'unseen' && e.getBoundingClientRect().right > innerWidth)"
        ".map((e) => e.textContent)"
    )
    assert cut == []
    # Columns stay in sight while rows move below them, on a phone names too.
    box = "document.querySelector('#layers').parentElement"
    shown.run(f"{box}.scrollTo(200, 500)")
    head, name, top, left = shown.run(
        f"(() => {{const b = {box}.getBoundingClientRect(), q = (s) => document.querySelector(s)"
        ".getBoundingClientRect(); return [q('#layers thead th').top, q('#layers tbody th').left,"
        "b.top, b.left]})()"
    )
    assert head == pytest.approx(top, abs=1)
    assert name >= left
    assert shown.complaints == []


def test_names_are_shown_not_run(browser: Browser, tmp_path: Path) -> None:
    name = "<img src=x onerror=document.body.remove()>"
    page.write(made(names=[name, "b"]).plan, tmp_path / "page.html")
    shown = browser.opened((tmp_path / "page.html").as_uri())
    assert column(shown, 1) == [name, "b"]
    assert shown.run("document.images.length") == 0
    assert shown.complaints == []


def test_what_goes_wrong_in_a_page_is_noticed(browser: Browser, tmp_path: Path) -> None:
    """The other tests would say so."""
    text = page.html(made(2).plan)
    for number, script in enumerate(("nothing.here()", "console.error('no')", "fetch('x')")):
        path = tmp_path / f"{number}.html"
        path.write_text(text.replace("addEventListener(", f"{script};addEventListener("))
        assert browser.opened(path.as_uri()).complaints != []
