"""inspect, eval, bench, methods and demo show what the library measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowrank
from lowrank.cli import console, inputs, layers

from .helpers import (
    PLANTED,
    TOKENS,
    cells,
    invoke,
    refused,
    run,
    tiny_tokenizer,
)


def test_inspect_finds_the_planted_rank(made: SimpleNamespace) -> None:
    said = run("inspect", made.dense)
    row = cells(said, PLANTED)
    assert row[:2] + row[-4:] == [PLANTED, "32x32", "3", "3", "3", "inf"]
    assert row[2:6] == ["16", "3.0", "3.0", "3.0"]
    found = lowrank.inspect(lowrank.from_pretrained(made.dense), progress=False)
    site = found["model.layers.0.mlp.up_proj"]
    columns = layers.shown(found)[0].keys()
    assert cells(said, site.name) == [site.row()[column] for column in columns]
    assert cells(said, "lm_head")[2] == "dense"
    assert "left dense: lm_head: the output head" in said
    assert f"{lowrank.from_pretrained(made.dense).num_parameters():,} parameters" in said
    assert max(map(len, said.splitlines())) <= console.WIDTH


def test_inspect_weighs_by_the_inputs(made: SimpleNamespace, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    model, text = lowrank.from_pretrained(made.dense), made.text.read_text(encoding="utf-8")
    found = lowrank.inspect(
        model, text, tokenizer=tiny_tokenizer(), length=32, timing=False, progress=False
    )
    out = tmp_path / "figures.json"
    args = ("inspect", made.dense, "--data", made.text, "--length", 32, "--json", out)
    said = run(*args)
    row, want = cells(said, name), found[name].row()
    for column in ("eff", "90 %", "95 %", "99 %", "eff W"):
        assert want[column] in row
    assert cells(said, name) != cells(run("inspect", made.dense), name)
    assert max(map(len, said.splitlines())) <= console.WIDTH
    assert "ms: time of one call" in said
    picture = tmp_path / "spectra.svg"
    assert f"wrote {picture}" in run(*args, "--force", "--plot", picture)
    assert "outputs, W H" in picture.read_text(encoding="utf-8")
    assert f"{picture} exists" in refused("inspect", made.dense, "--plot", picture)
    stored = {site["site"]: site for site in json.loads(out.read_text())["sites"]}
    output = found[name].output
    assert output is not None
    assert stored[name]["output"]["stable_rank"] == pytest.approx(output.stable_rank, rel=1e-6)
    assert "add --force" in refused(*args)


def test_inspect_shows_features(made: SimpleNamespace, tmp_path: Path) -> None:
    name, out = "model.layers.1.mlp.down_proj", tmp_path / "features.json"
    text = made.text.read_text(encoding="utf-8")
    model = lowrank.from_pretrained(made.dense)
    found = lowrank.features(model, text, tokenizer=tiny_tokenizer(), length=32, progress=False)
    said = run("inspect", made.dense, "--data", made.text, "--length", 32, "--features",
               "--json", out)  # fmt: skip
    want = found[name].spectrum
    assert want is not None
    assert cells(said, name)[:4] == [name, "48", *(want.row()[c] for c in ("eff", "eff σ"))]
    assert max(map(len, said.splitlines())) <= console.WIDTH
    assert "width: features that the layer reads." in said
    stored = {site["site"]: site for site in json.loads(out.read_text())["sites"]}
    assert stored[name]["spectrum"]["stable_rank"] == pytest.approx(want.stable_rank, rel=1e-6)
    assert "add --data TEXT" in refused("inspect", made.dense, "--features")


def test_inspect_lists_what_is_factored(made: SimpleNamespace) -> None:
    layer = lowrank.from_pretrained(made.out).get_submodule(PLANTED)
    params = layer.rank * 64
    said = run("inspect", made.out)
    row = [PLANTED, "32x32", str(layer.rank), f"{params / 1024:.3f}", "16"]
    assert cells(said, PLANTED) == row
    assert "rank: of a layer that is already factored" in said


def test_long_names_cost_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"site": "model." * 20, "params": "1,234,567", "what it does": "many words " * 9}]
    console.show(console.table_of(rows))
    said = capsys.readouterr().out
    assert "model." * 20 in said
    assert "1,234,567" in said
    assert said.count("many") == 9
    assert "…" not in said


def test_eval_prints_what_the_library_measures(made: SimpleNamespace) -> None:
    args = ("--text", made.text, "--reference", made.dense, "--length", 32)
    said = run("eval", made.out, *args)
    models = [inputs.load_model(str(folder)) for folder in (made.out, made.dense)]
    text, tokenizer = made.text.read_text(encoding="utf-8"), tiny_tokenizer()
    for folder, model in zip((made.out, made.dense), models, strict=True):
        value = lowrank.perplexity(model, tokenizer, text, length=32)
        assert f"{value:.3f}" in cells(said, str(folder))
    away = lowrank.kl(*models, text, tokenizer=tokenizer, length=32)
    assert cells(said, str(made.out))[-1] == f"{away:.4f}"
    back = lowrank.kl(*reversed(models), text, tokenizer=tokenizer, length=32)
    assert away > 0.01
    assert f"{away:.4f}" != f"{back:.4f}"
    assert "KL" not in run("eval", made.out, "--text", made.text)


def test_bench_prints_both_models(made: SimpleNamespace) -> None:
    said = run("bench", made.out, "--reference", made.dense, "--tokens", 8, "--repeats", 1)
    models = [inputs.load_model(str(folder)) for folder in (made.out, made.dense)]
    found = lowrank.benchmark(
        models[0], {"input_ids": torch.zeros(1, 8, dtype=torch.long)}, models[1], repeats=1
    )
    assert found.reference is not None
    ratio = f"{found.macs / found.reference.macs:.3f}"
    assert cells(said, "MACs") == ["MACs", f"{found.macs:,}", f"{found.reference.macs:,}", ratio]
    assert "8 positions on cpu" in said
    alone = run("bench", made.dense, "--repeats", 1)
    assert f"{TOKENS} positions" in alone  # not 512: it knows no more
    assert cells(alone, "parameters") == ["parameters", f"{found.reference.params:,}"]


def test_methods_lists_the_registries() -> None:
    said = run("methods")
    for name in (*lowrank.METHODS, *lowrank.POLICIES):
        assert len(cells(said, name)) > 4
    assert cells(said, "whitened")[1] == "--data"
    assert cells(said, "svd")[1] != "--data"


def test_demo_hands_over_its_folder_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Path | None] = []

    def fake(out: Path | None = None) -> int:
        given.append(out)
        return len(given) - 1

    monkeypatch.setitem(sys.modules, "lowrank.demo", SimpleNamespace(run_demo=fake))
    assert invoke("demo").exit_code == 0
    assert invoke("demo", "--out", tmp_path / "kept").exit_code == 1
    assert given == [None, tmp_path / "kept"]
