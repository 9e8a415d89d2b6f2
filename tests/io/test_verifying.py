"""`lowrank verify`: a sound folder is described, a damaged one is an error that names what is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank import nn as forms
from lowrank.io import verify
from tests.cli.helpers import invoke
from tests.zoo import make

WEIGHTS, INDEX, CONFIG = "model.safetensors", "lowrank.json", "config.json"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        forms.LowRankLinear(12, 12, 3), forms.PivotedLinear(12, 12, 3), nn.BatchNorm1d(12),
        forms.LowRankMaskedLinear(12, 12, 3, 20),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lowrank.save(net(), tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    model, _ = lowrank.compress(make("llama"), 0.6, data=None, storage="pivoted")
    model.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


def forget(folder: Path) -> None:
    """Remove the checksum, so that what it covers is found without it."""
    index = json.loads((folder / INDEX).read_text())
    del index["sha256"]
    (folder / INDEX).write_text(json.dumps(index))


def test_a_sound_folder(folder: Path) -> None:
    found = verify(folder)
    assert (found.files, found.modules, found.checksum) == (1, 3, True)
    assert found.dtypes == {"F32": 14, "I32": 1, "I64": 1, "U8": 1}
    result = invoke("verify", folder)
    assert result.exit_code == 0
    assert "sound: 1 file, 17 tensors (" in result.stdout + result.stderr
    assert "all numbers finite, checksum equal" in result.stdout + result.stderr


def test_a_sharded_transformers_model(pretrained: Path) -> None:
    found = verify(pretrained)
    assert found.files > 1
    assert found.modules == 14
    assert not found.checksum


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_tied_models_are_sound(kind: str, tmp_path: Path) -> None:
    model, _ = lowrank.compress(make(kind), 0.6, data=None, target_modules="all")
    lowrank.save(model, tmp_path)
    assert verify(tmp_path).modules > 10


def test_a_dense_model_is_sound_too(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    assert verify(tmp_path).modules == 0


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nan": (lambda t: t["0.up.bias"].fill_(float("nan")), "NaN or Inf in 0.up.bias"),
    "inf": (lambda t: t["2.running_var"].fill_(float("inf")), "NaN or Inf in 2.running_var"),
    "shape": (lambda t: t.update({"0.up.weight": torch.ones(12, 4)}), "0 does not fit its files"),
    "missing": (lambda t: t.pop("1.order"), "1.order is missing"),
    "range": (lambda t: t["1.order"].fill_(0), "every number in [0, 11] once"),
    "mask": (lambda t: t["3.sparse.mask"].fill_(0), "must keep 20 entries"),
    "dtype": (lambda t: t.update({"0.up.weight": t["0.up.weight"].double()}), "F64 instead of"),
    "index": (lambda t: t.update({"1.order": t["1.order"].long()}), "order torch.int64"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(folder: Path, what: str) -> None:
    how, words = DAMAGE[what]
    change(folder / WEIGHTS, how)
    if what != "dtype":
        with pytest.raises(LowrankError, match="its checksum differs"):
            verify(folder)
    forget(folder)
    with pytest.raises(LowrankError) as caught:
        verify(folder)
    assert words in str(caught.value)
    result = invoke("verify", folder)
    assert result.exit_code == 2
    assert result.stderr.startswith("lowrank: ")


def test_a_bit_that_nothing_else_shows(folder: Path) -> None:
    change(folder / WEIGHTS, lambda t: t["0.up.bias"].add_(1))
    with pytest.raises(LowrankError, match="its checksum differs"):
        verify(folder)


def test_folders_that_are_none(folder: Path, pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match="there is no folder"):
        verify(tmp_path / "absent")
    with pytest.raises(LowrankError, match="is not a saved model"):
        verify(tmp_path)
    index = pretrained / f"{WEIGHTS}.index.json"
    for bad in ({"weight_map": {"a": "../../x"}}, {"weight_map": []}, {}):
        index.write_text(json.dumps(bad))
        with pytest.raises(LowrankError, match="files of this folder"):
            verify(pretrained)
    (pretrained / CONFIG).write_text("[" * 5000 + "]" * 5000)
    with pytest.raises(LowrankError, match="is not valid JSON"):
        verify(pretrained)


def test_it_loads_nothing_and_changes_nothing(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    verify(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
