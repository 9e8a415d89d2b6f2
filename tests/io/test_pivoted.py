"""Pivoted layers on disk: stock round trips, new processes, generic checkpoints, back to dense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.io import attach, load, save, to_dense
from lowrank.nn import LowRankLinear, PivotedLinear, pivot_layer, remember_layout

REPO = Path(__file__).parents[2]
SCRIPT = """
import sys, torch, lowrank
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.arange(14).reshape(2, 7) % 59 + 2
with torch.no_grad():
    torch.save((model.dtype, model(input_ids=tokens).logits), sys.argv[2])
"""


def pivoted(model: nn.Module) -> nn.Module:
    """Every plain factored layer of less than full rank in the pivoted form."""
    done: dict[int, nn.Module] = {}
    for parent in [*model.modules()]:
        for key, child in parent._modules.items():
            if isinstance(child, LowRankLinear) and child.rank < child.out_features:
                new = done.setdefault(id(child), pivot_layer(child))
                remember_layout(new, child.layout)
                parent.register_module(key, new)
    return model


def compressed(zoo: Any, kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = pivoted(zoo.compressed(kind, dtype))
    assert attach(model)
    return model


def sides(model: nn.Module) -> set[str]:
    return {module.side for module in model.modules() if isinstance(module, PivotedLinear)}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.bfloat16), ("gpt2", torch.float16), ("bert", torch.float32)],
)
def test_stock_round_trip_is_exact(zoo, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = compressed(zoo, kind, dtype)
    assert sides(model) == {"out", "in"}
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert any(tensor.dtype == torch.int32 for tensor in after.values())
    assert torch.equal(zoo.logits(model), zoo.logits(loaded))


def test_another_process_gets_the_same_logits(zoo, tmp_path: Path) -> None:
    model = compressed(zoo, "llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / "model"), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dtype, logits = torch.load(tmp_path / "logits.pt")
    assert dtype == torch.bfloat16
    assert torch.equal(logits, zoo.logits(model))


def test_a_cast_on_loading_leaves_the_order(zoo, tmp_path: Path) -> None:
    model = compressed(zoo, "llama")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float16, device_map="cpu")
    orders = [m.order for m in loaded.modules() if isinstance(m, PivotedLinear)]
    assert {order.dtype for order in orders} == {torch.int32}
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}
    want = zoo.logits(model)
    torch.testing.assert_close(zoo.logits(loaded).float(), want, rtol=0.05, atol=0.01)


def test_generic_checkpoints_keep_it_bit_for_bit(zoo, net: nn.Module, tmp_path: Path) -> None:
    """Also where several names share one layer, and in a cast."""
    model = pivoted(net)
    assert sides(model) == {"out", "in"}
    save(model, tmp_path)
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(2))
    loaded = load(tmp_path, zoo.Net().eval)
    assert torch.equal(loaded(x), model(x))
    assert loaded.shared is loaded.again
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["body.0.order"].dtype == torch.int32
    half = load(tmp_path, zoo.Net().eval, dtype=torch.bfloat16)
    assert torch.equal(half.body[0].order, model.body[0].order)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_file_that_does_not_fit_is_refused(zoo, net: nn.Module, tmp_path: Path) -> None:
    save(pivoted(net), tmp_path)
    index, tensors = tmp_path / "lowrank.json", load_file(tmp_path / "model.safetensors")
    specs = json.loads(index.read_text())
    assert specs["modules"]["body.2"] == {
        "type": "PivotedLinear", "in_features": 20, "out_features": 12, "rank": 4, "side": "out",
        "bias": False,
    }  # fmt: skip
    skeleton = zoo.Net()
    check = zoo.snapshot(skeleton)
    for change, said in (
        ({"side": "in"}, "does not fit the model"),
        ({"side": "up"}, "unknown side 'up'"),
        ({"in_features": 21}, r"body\.2: stored as \(out, in\) = \(12, 21\)"),
    ):
        module = {**specs["modules"]["body.2"], **change}
        changed = {**specs, "modules": {**specs["modules"], "body.2": module}}
        index.write_text(json.dumps(changed))
        with pytest.raises(LowrankError, match=said):
            load(tmp_path, skeleton)
        check()
    index.write_text(json.dumps(specs))
    save_file(
        {name: t for name, t in tensors.items() if name != "body.2.order"},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(LowrankError, match=r"missing: body\.2\.order"):
        load(tmp_path, skeleton)
    check()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dense_again_it_is_the_stock_model(zoo, tmp_path: Path, kind: str) -> None:
    """Also of a layer that stores its weight as (in, out)."""
    model = compressed(zoo, kind)
    want = zoo.logits(model)
    lowrank.export(model, tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(zoo.logits(loaded), want, rtol=1e-4, atol=1e-6)
    assert [type(m) for m in to_dense(model).modules()] == [
        type(m) for m in zoo.make(kind).modules()
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merged_weights_are_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 30), (30, 20)):
        up = torch.randn(shape[0], 8, generator=generator, dtype=torch.float64)
        down = torch.randn(8, shape[1], generator=generator, dtype=torch.float64)
        layer = PivotedLinear.from_factors(down, up, up[:, 0], dtype=dtype)
        merged = to_dense(layer)
        exact = layer.dense_weight(torch.float64)
        unit = torch.finfo(dtype).eps / 2 + 1e-5
        torch.testing.assert_close(merged.weight.double(), exact, rtol=unit, atol=unit)
        assert torch.equal(merged.bias, layer.bias)
        assert merged.weight.dtype == dtype
