"""A compression as a file: run, run again to the same bytes, printed; and what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import lowrank

from .helpers import refused, run

RATIO = {"ratio": 0.6, "method": "whitened", "length": 32}


@pytest.fixture
def recipe(made: SimpleNamespace, tmp_path: Path) -> Path:
    """A recipe beside its text, with paths of its own folder."""
    shutil.copy(made.text, tmp_path / "text.txt")
    held = {"model": str(made.dense), "data": "text.txt", "out": "out", **RATIO}
    return written(tmp_path, held)


def written(folder: Path, held: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(held if isinstance(held, str) else yaml.safe_dump(held))
    return path


def changed(path: Path, **values: Any) -> Path:
    held = {**yaml.safe_load(path.read_text()), **values}
    return written(path.parent, {k: v for k, v in held.items() if v is not None})


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_recipe_does_what_the_options_do(
    made: SimpleNamespace, recipe: Path, tmp_path: Path
) -> None:
    run("run", recipe)
    data = ("--data", made.text, "--length", 32)
    run("compress", made.dense, "--ratio", 0.6, "--method", "whitened", *data, "-o", tmp_path / "b")
    assert weights(tmp_path / "out") == weights(tmp_path / "b")


def test_what_stands_beside_the_weights_gives_them_again(recipe: Path, tmp_path: Path) -> None:
    run("run", changed(recipe, effort="fast", method=None, target_modules=["q_proj", "up_proj"]))
    said = run("recipe", tmp_path / "out")
    held = yaml.safe_load(said)
    assert held["target_modules"] == ["q_proj", "up_proj"]
    assert held["data"] == str(tmp_path / "text.txt")
    assert held["from_disk"] is False
    assert held["made_with"]["torch"]
    assert "out" not in held
    run("run", tmp_path / "out", "-o", tmp_path / "again")  # from anywhere
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    assert run("recipe", tmp_path / "again") == said


def test_a_plan_and_a_rank(made: SimpleNamespace, recipe: Path, tmp_path: Path) -> None:
    changed(recipe, ratio=None, rank=4, data=None, method="svd", length=None)
    run("run", recipe)
    assert lowrank.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj.rank == 4
    run("plan", made.dense, "--rank", 4, "--method", "svd", "-o", tmp_path / "plan.json")
    by_plan = written(tmp_path, {"model": str(made.dense), "plan": "plan.json"})
    run("run", by_plan, "-o", tmp_path / "b")
    assert weights(tmp_path / "b") == weights(tmp_path / "out")
    assert yaml.safe_load(run("recipe", tmp_path / "b"))["plan"] == str(tmp_path / "plan.json")


def test_a_text_that_changed_is_refused(recipe: Path, tmp_path: Path) -> None:
    run("run", recipe)
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + " more")
    message = refused("run", tmp_path / "out", "-o", tmp_path / "again")
    assert "text.txt has changed since" in message
    assert not (tmp_path / "again").exists()
    held = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    del held["data_sha256"]
    run("run", written(tmp_path, held), "-o", tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ratoi": 0.5}, "unknown"),
        ({"ratoi": 0.5}, "did you mean 'ratio'"),
        ({"ratio": "much"}, "ratio: 'much' is not of the kind expected"),
        ({"minutes": "20"}, "minutes: '20' is not of the kind expected"),
        ({"length": True}, "length: True is not of the kind expected"),
        ({"target_modules": [3]}, "target_modules: [3] is not of the kind"),
        ({"ratio": None}, "no target size"),
        ({"ratio": 1.5}, "ratio is the fraction kept and must be"),
        ({"out": None}, "says no `out`: add --out FOLDER"),
        ({"model": None}, "a recipe maps names to values"),
        ({"data": "none.txt"}, "none.txt does not exist"),
        ({"method": "magic"}, "unknown method 'magic'"),
    ],
)
def test_what_is_wrong_is_said(recipe: Path, change: dict[str, Any], said: str) -> None:
    assert said in refused("run", changed(recipe, **change))
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "model: [", "\x00", "just words"])
def test_files_that_are_no_recipes(tmp_path: Path, text: str) -> None:
    message = refused("run", written(tmp_path, text))
    assert "a recipe maps names to values" in message or "is not YAML" in message


def test_no_recipe_there(tmp_path: Path) -> None:
    assert "there is no recipe at" in refused("run", tmp_path / "none.yaml")
    assert "there is no recipe at" in refused("recipe", tmp_path)
