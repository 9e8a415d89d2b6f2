"""The page in a real browser, where one is installed: all rows, sorted by click and address."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lowrank import page
from tests.pictures import made

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed ({', '.join(BROWSERS)})"),
]


def opened(text: str, folder: Path, address: str = "") -> str:
    """The document as it stands after the page's script has run."""
    (folder / "page.html").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom",
         f"{(folder / 'page.html').as_uri()}{address}"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return done.stdout


def column(document: str, index: int) -> list[str]:
    body = document[document.index("<tbody>") :]
    return [re.findall(r"<td[^>]*>(.*?)</td>", row)[index] for row in body.split("</tr>")[:-1]]


def test_rows_stand_as_the_address_says(tmp_path: Path) -> None:
    report = made(36).report
    document = opened(page.html(report), tmp_path, "#sort=rank,down")
    ranks = column(document, 4)
    assert len(ranks) == 36
    known = [int(rank) for rank in ranks if rank]
    assert known == sorted(known, reverse=True)
    assert ranks[len(known) :] == [""] * (36 - len(known))  # dense layers come last
    assert 'aria-sort="descending"' in document


def test_a_click_sorts_and_a_second_one_turns_it_round(tmp_path: Path) -> None:
    report = made(36).report
    click = 'document.querySelectorAll("th button")[{0}].click();'
    for clicks, down in ((1, False), (2, True)):
        script = f"<script>{click.format(8) * clicks}</script></body>"
        document = opened(page.html(report).replace("</body>", script), tmp_path)
        errors = [float(value) for value in column(document, 8) if value]
        assert errors == sorted(errors, reverse=down)
        assert errors[0] != errors[-1]
    names = opened(
        page.html(report).replace("</body>", f"<script>{click.format(1)}</script></body>"), tmp_path
    )
    first = column(names, 1)
    assert first.index("model.layers.5.self_attn.q_proj") > first.index(
        "model.layers.4.mlp.up_proj"
    )
    assert sorted(first) == sorted(entry.name for entry in report.plan.entries)


def test_names_are_shown_not_run(tmp_path: Path) -> None:
    name = "<img src=x onerror=document.body.remove()>"
    document = opened(page.html(made(names=[name, "b"]).plan), tmp_path)
    assert "<img" not in document
    assert column(document, 1) == ["&lt;img src=x onerror=document.body.remove()&gt;", "b"]
