"""inspect, eval, bench, methods and demo show what the library measures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank.cli import console, inputs, layers

from .helpers import (
    PLANTED,
    TOKENS,
    cells,
    invoke,
    run,
    tiny_tokenizer,
)


def test_inspect_finds_the_planted_rank(made: SimpleNamespace) -> None:
    said = run("inspect", made.dense)
    assert cells(said, PLANTED) == [PLANTED, "32x32", "1,024", "16", "3", "3", "3"]
    weight = lowrank.from_pretrained(made.dense).model.layers[0].mlp.up_proj.weight
    energy = np.linalg.svd(weight.detach().double().numpy())[1] ** 2
    kept = np.cumsum(energy) / energy.sum()
    ranks = [str(int((kept < share).sum()) + 1) for share in (0.90, 0.95, 0.99)]
    row = cells(said, "model.layers.0.mlp.up_proj")
    assert row == ["model.layers.0.mlp.up_proj", "48x32", "1,536", "20", *ranks]
    assert cells(said, "lm_head")[-2:] == ["left", "dense"]
    assert "left dense: lm_head: the output head" in said
    assert f"{lowrank.from_pretrained(made.dense).num_parameters():,} parameters" in said
    assert max(map(len, said.splitlines())) <= console.WIDTH


def test_inspect_weighs_by_the_inputs(made: SimpleNamespace) -> None:
    name = "model.layers.0.mlp.down_proj"
    model, text = lowrank.from_pretrained(made.dense), made.text.read_text(encoding="utf-8")
    seen = lowrank.calibrate(model, text, tokenizer=tiny_tokenizer(), length=32, progress=False)
    values, vectors = np.linalg.eigh(seen.statistics[name].gram.numpy())
    root = vectors * np.sqrt(values.clip(0))
    weight = model.get_submodule(name).weight.detach().double().numpy()
    energy = np.linalg.svd(weight @ root)[1] ** 2
    kept = np.cumsum(energy) / energy.sum()
    ranks = [str(int((kept < share).sum()) + 1) for share in (0.90, 0.95, 0.99)]
    said = run("inspect", made.dense, "--data", made.text, "--length", 32)
    assert cells(said, name)[-3:] == ranks
    assert cells(said, name) != cells(run("inspect", made.dense), name)


def test_inspect_lists_what_is_factored(made: SimpleNamespace) -> None:
    layer = lowrank.from_pretrained(made.out).get_submodule(PLANTED)
    params = layer.rank * 64
    row = [PLANTED, "32x32", str(params), str(layer.rank), f"{params / 1024:.3f}", "16"]
    assert cells(run("inspect", made.out), PLANTED) == row


def test_inspect_says_why_a_layer_is_left() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8))
    nn.utils.parametrizations.weight_norm(model[1])
    model[2].weight.data[0, 0] = torch.nan
    good, parametrized, broken = layers.rows(model, None)
    assert (good["note"], good["90 %"] != "") == ("", True)
    assert ("parametrized" in parametrized["note"], parametrized["90 %"]) == (True, "")
    assert (broken["note"], broken["90 %"]) == ("the weight holds NaN or Inf", "")
    unseen = next(layers.rows(model, {}))
    assert (unseen["note"], unseen["90 %"]) == ("the text did not reach it", "")


def test_long_names_cost_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"site": "model." * 20, "params": "1,234,567", "what it does": "many words " * 9}]
    console.show(console.table(rows))
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

    monkeypatch.setitem(sys.modules, "lowrank.demo", SimpleNamespace(run=fake))
    assert invoke("demo").exit_code == 0
    assert invoke("demo", "--out", tmp_path / "kept").exit_code == 1
    assert given == [None, tmp_path / "kept"]
