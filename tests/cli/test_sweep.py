"""The command sweep: a table, a picture, a cache."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import lowrank

from .helpers import cells, refused, run, tiny_tokenizer


def test_the_table_is_what_the_library_measures(made: SimpleNamespace, tmp_path: Path) -> None:
    figures, cache = tmp_path / "out.json", tmp_path / "seen.safetensors"
    args = ["sweep", made.dense, "--ratios", "0.8,0.5", "--data", made.text, "--length", 8]
    said = run(*args, "--json", figures, "--cache", cache)
    model = lowrank.from_pretrained(made.dense)
    text = made.text.read_text(encoding="utf-8")
    data = lowrank.calibration.batches.materialise(text, tiny_tokenizer(), length=8)
    found = lowrank.sweep(model, [0.8, 0.5], data=data, progress=False)
    for point, row in zip(found.points, found.rows(), strict=True):
        shown = cells(said, f"{point.ratio:g}")
        assert shown[:6] == [
            row[c] for c in ("ratio", "kept", "of model", "parameters", "bytes", "KL")
        ]
    assert [p["kl"] for p in json.loads(figures.read_text())["points"]] == [
        p.kl for p in found.points
    ]
    again = run(*args, "--cache", cache)
    assert cells(again, "0.5")[:6] == cells(said, "0.5")[:6]


def test_a_picture(made: SimpleNamespace, tmp_path: Path) -> None:
    picture = tmp_path / "front.png"
    args = ["sweep", made.dense, "--ratios", "0.8,0.5", "--data", made.text, "--length", 8]
    run(*args, "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "exists" in refused(*args, "--plot", picture)


def test_bad_words_cost_no_model(made: SimpleNamespace) -> None:
    assert "--ratios must be a number" in refused("sweep", "nowhere", "--ratios", "0.8,x")
    assert "ratio is the fraction kept" in refused("sweep", made.dense, "--ratios", "1.8")
    assert "distinct fractions" in refused("sweep", made.dense, "--ratios", "0.8,0.8")
