"""Tensors that fit by name and shape, and yet cannot be what was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank import nn as forms
from tests.zoo import make

WEIGHTS, INDEX = "model.safetensors", "lowrank.json"
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: forms.LowRankLinear(12, 12, 3),
    "pivoted": lambda: forms.PivotedLinear(12, 12, 3),
    "columns": lambda: forms.LowRankSparseLinear(12, 12, 3, 2),
    "entries": lambda: forms.LowRankMaskedLinear(13, 12, 3, 20),
    "coded": lambda: forms.DenseSparseLinear(12, 12, 6, 2),
    "codes": lambda: forms.SparseDenseLinear(12, 12, 6, 2),
    "runs": lambda: forms.BlockLowRankLinear(12, 12, 3, 20, 13),
}


def skeleton() -> nn.Module:
    wide = {"entries": 13}
    return nn.ModuleDict({name: nn.Linear(wide.get(name, 12), 12) for name in LAYERS})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lowrank.save(nn.ModuleDict({name: layer() for name, layer in LAYERS.items()}), tmp_path)
    return tmp_path


def change(folder: Path, name: str, how: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = how(tensors[name]).contiguous()
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path) -> str:
    model = skeleton()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(LowrankError) as caught:
        lowrank.load(folder, model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    return str(caught.value)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
)
@pytest.mark.parametrize("name", ["plain.down.weight", "coded.value", "columns.up.bias"])
def test_one_tensor_of_another_dtype(folder: Path, name: str, dtype: torch.dtype) -> None:
    change(folder, name, lambda tensor: tensor.to(dtype))
    assert name in refused(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.float32])
def test_an_index_of_another_dtype(folder: Path, dtype: torch.dtype) -> None:
    change(folder, "pivoted.order", lambda order: order.to(dtype))
    assert "pivoted.order" in refused(folder)


RANGES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "column too large": ("columns.sparse.index", lambda i: i + 11, "ascending numbers in [0, 11]"),
    "column negative": ("columns.sparse.index", lambda i: i - 1, "ascending numbers in [0, 11]"),
    "column twice": ("columns.sparse.index", lambda i: 0 * i, "ascending numbers in [0, 11]"),
    "order too large": ("pivoted.order", lambda i: i + 1, "every number in [0, 11] once"),
    "order twice": ("pivoted.order", lambda i: 0 * i, "every number in [0, 11] once"),
    "atom too large": ("coded.index", lambda i: i + 5, "distinct atoms in [0, 5]"),
    "atom twice": ("coded.index", lambda i: 0 * i, "distinct atoms in [0, 5]"),
    "atom of inputs": ("codes.index", lambda i: i + 9, "distinct atoms in [0, 5]"),
    "runs too wide": ("runs.down.place", lambda p: p + 9, "of 20 in all, got 47"),
    "runs outside": (
        "runs.up.place",
        lambda p: p + p.new_tensor([9, 0]),
        "up.place must hold runs",
    ),
    "too few entries": ("entries.sparse.mask", lambda m: 0 * m, "must keep 20 entries"),
    "entries beyond": ("entries.sparse.mask", lambda m: m.roll(11, 1), "all within its rows"),
}


@pytest.mark.parametrize("what", RANGES)
def test_numbers_out_of_range_are_told_at_load(folder: Path, what: str) -> None:
    name, how, words = RANGES[what]
    change(folder, name, how)
    said = refused(folder)
    assert words in said
    assert name.partition(".")[0] in said


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["plain.down.weight", "coded.value", "columns.up.bias"])
def test_a_factor_that_is_not_finite_is_told_at_load(folder: Path, name: str, bad: float) -> None:
    change(folder, name, lambda tensor: tensor.index_fill(0, torch.tensor([1]), bad))
    assert f"NaN or Inf in {name}: damaged file" in refused(folder)


def test_the_file_as_it_was_saved_loads(folder: Path) -> None:
    lowrank.load(folder, skeleton())
    index = json.loads((folder / INDEX).read_text())
    assert index["dtype"] == "F32"
    assert "dtypes" not in index
    del index["dtype"]  # as files were written before
    (folder / INDEX).write_text(json.dumps(index))
    lowrank.load(folder, skeleton())


def test_a_model_of_several_dtypes_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double(), nn.Linear(3, 3))
    lowrank.save(model, tmp_path)
    loaded = lowrank.load(tmp_path, lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))))
    assert [layer.weight.dtype for layer in loaded] == [layer.weight.dtype for layer in model]


def test_a_cast_on_loading_is_no_damage(folder: Path) -> None:
    loaded = lowrank.load(folder, skeleton(), dtype=torch.bfloat16)
    assert loaded["plain"].down.weight.dtype == torch.bfloat16
    lowrank.save(loaded, folder)
    assert lowrank.load(folder, skeleton())["coded"].value.dtype == torch.bfloat16


DEEP = "[" * 5000 + "]" * 5000
INDICES = {
    "type a list": ("type", []),
    "shared a list": ("shared", []),
    "shared an object": ("shared", {}),
    "size an object": ("rank", {}),
    "size a list of lists": ("rank", [[]]),
    "word a list": ("side", []),
}


@pytest.mark.parametrize("what", INDICES)
def test_specs_that_are_no_specs(folder: Path, what: str) -> None:
    key, value = INDICES[what]
    index = json.loads((folder / INDEX).read_text())
    index["modules"]["pivoted"][key] = value
    (folder / INDEX).write_text(json.dumps(index))
    assert "pivoted" in refused(folder)


def test_json_that_is_too_deep(folder: Path) -> None:
    (folder / INDEX).write_text(DEEP)
    assert "is not valid JSON" in refused(folder)
    plan = folder / "plan.json"
    plan.write_text(DEEP)
    with pytest.raises(LowrankError, match="the plan is not JSON"):
        lowrank.Plan.load(plan)
    plan.write_bytes(b'{"format": "\xea"}')
    with pytest.raises(LowrankError, match="UTF-8"):
        lowrank.Plan.load(plan)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("q_proj.order", lambda order: order.flip(0) * 2),
        ("q_proj.order", lambda order: order.view(torch.float32)),
        ("q_proj.mix.weight", lambda weight: weight.view(torch.int32)),
    ],
)
def test_transformers_models_too(tmp_path: Path, name: str, how: Callable) -> None:
    model, _ = lowrank.compress(make("llama"), 0.6, data=None, storage="pivoted")
    lowrank.save(model, tmp_path)
    change(tmp_path, f"model.layers.0.self_attn.{name}", how)
    with pytest.raises(LowrankError, match="damaged file"):
        lowrank.from_pretrained(tmp_path)
