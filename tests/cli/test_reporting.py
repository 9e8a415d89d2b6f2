"""report: pages of plans and reports, and one clear line for nonsense."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.pictures import made as picture

from .helpers import PLANTED, refused, run


def test_a_plan_and_what_came_of_it_become_pages(made: SimpleNamespace, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "page.html"
    run("plan", made.dense, "--ratio", 0.6, "-o", plan)
    assert f"wrote {out}" in run("report", plan, "-o", out)
    text = out.read_text(encoding="utf-8")
    assert PLANTED in text
    assert "Low-rank plan" in text
    assert "add --force" in refused("report", plan, "-o", out)
    run("report", plan, "-o", out, "--force")
    run("report", plan)
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == text
    run("report", made.out, "-o", tmp_path / "of_folder.html")
    assert "Low-rank report" in (tmp_path / "of_folder.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("entries", 0, "size"), [10**6], "rank must be in"),
        (("entries", 0, "size"), "four", "size must be"),
        (("entries", 0, "sites"), [], "sites must be"),
        (("entries", 0, "error"), -1, "error must be"),
        (("entries", 0, "shape"), [3], "shape must be two integers"),
        (("entries",), {}, "entries must be a list"),
        (("model",), None, "model must be params, bytes and macs"),
        (("asked", "ratio"), "much", "ratio must be a number"),
        (("asked", "unit"), "apples", "unit must be one of"),
        (("settings",), 3, "settings must be an object"),
        (("format",), "recipe", "not a lowrank plan"),
    ],
)
def test_nonsense_is_one_clear_line(
    tmp_path: Path, where: tuple[Any, ...], value: Any, words: str
) -> None:
    body = json.loads(picture(3).plan.to_json())
    inner = body
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(body))
    assert words in refused("report", path)
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text(picture(3).plan.to_json()[:-40])
    assert "the plan is not JSON" in refused("report", tmp_path / "cut.json")
    assert "no plan or report at" in refused("report", tmp_path / "absent.json")
    assert "no plan or report at" in refused("report", tmp_path)
    (tmp_path / "plan.json").write_text(picture(3).plan.to_json())
    assert "is a folder" in refused("report", tmp_path / "plan.json", "-o", tmp_path)
    absent = tmp_path / "absent" / "p.html"
    assert "No such file or directory" in refused("report", tmp_path / "plan.json", "-o", absent)
