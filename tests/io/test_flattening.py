"""Quantized weights go into files as their parts and come back as they were, or not at all."""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import lowrank
from lowrank import LowrankError
from lowrank.io import verify
from lowrank.measure.size import model_cost
from tests.coded import FILES, Known, in_eight_bits, listed_by_torchao
from tests.zoo import llama, make, mlp, tokens

WEIGHTS = "model.safetensors"
DOWN = "model.layers.0.mlp.up_proj.down"
QUERY = "model.layers.1.self_attn.q_proj"  # left dense


@pytest.fixture(autouse=True)
def _torchao() -> Iterator[None]:
    with listed_by_torchao():
        yield


@functools.cache
def compressed(tied: bool = False) -> Any:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True).eval() if tied else make("llama")
    return lowrank.compress(model, 0.6, data=None, exclude_modules="q_proj", progress=False)[0]


def coded(tied: bool = False) -> Any:
    return in_eight_bits(copy.deepcopy(compressed(tied)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return in_eight_bits(lowrank.compress(mlp(24, 40, 16), 0.6, data=None, progress=False)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("coded")
    with listed_by_torchao():
        coded().save_pretrained(where)
    return where


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 6)).logits


def edited(folder: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The folder with other entries of quantized weights."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    change(config["quantization_config"]["quantized"])
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("size", ["5GB", "3KB"])
def test_a_transformers_model_comes_back(size: str, tmp_path: Path) -> None:
    """In one file, or in shards so small that the parts of a weight lie in several."""
    model = coded()
    want = logits(model)
    model.save_pretrained(tmp_path / "out", max_shard_size=size)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 5) == (size == "3KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), want)
    assert type(again.get_parameter(f"{DOWN}.weight")) is Known
    assert type(again.get_parameter(f"{QUERY}.weight")) is Known
    assert not dict(again.named_buffers()).keys() & {f"{DOWN}._weight_code"}
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(lowrank.from_pretrained(tmp_path / "twice")), want)


def test_what_is_in_the_folder(folder: Path) -> None:
    stored = load_file(folder / WEIGHTS)
    assert stored[f"{DOWN}._weight_code"].dtype == torch.int8
    assert f"{DOWN}.weight" not in stored
    assert stored[f"{QUERY}.weight"].shape == (
        1,
    )  # fits no dense layer: nobody loads it without us
    assert len(stored[f"{QUERY}._weight_scale"]) == 32
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert declared["quantized"][f"{DOWN}.weight"] == {
        "type": "Known",
        "options": {"dtype": "torch.float32", "blocks": [1, 8]},
        "tensors": {"code": ["I8", [11, 32]], "scale": ["F32", [11, 1]]},
    }
    assert declared["modules"][DOWN.removesuffix(".down")]["rank"] == 11


def test_any_other_module_comes_back(tmp_path: Path) -> None:
    model, x = net(), torch.randn(3, 24)
    with torch.no_grad():
        want = model(x)
    lowrank.save(model, tmp_path)
    with torch.device("meta"):
        skeleton = mlp(24, 40, 16)
    again = lowrank.load(tmp_path, skeleton)
    with torch.no_grad():
        assert torch.equal(again(x), want)
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {"0.up.bias", "2.bias"}
    assert "3 quantized weights" in str(verify(tmp_path))


def twice() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    return nn.Sequential(layer, nn.ReLU(), layer)


def test_one_layer_under_two_names_is_stored_once(tmp_path: Path) -> None:
    model = in_eight_bits(twice())
    lowrank.save(model, tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == {"0.bias", "0._weight_code", "0._weight_scale"}
    again: Any = lowrank.load(tmp_path, twice())
    assert type(again[0].weight) is Known
    assert again[0].weight is again[2].weight


def test_two_weights_are_not_loaded_as_one(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    lowrank.save(in_eight_bits(layers), tmp_path)
    layers[1].weight = layers[0].weight = nn.Parameter(torch.zeros(16, 16))
    with pytest.raises(LowrankError, match=r"_weight_code as two tensors, which the model ties"):
        lowrank.load(tmp_path, layers)


def test_a_base_model_and_its_head_read_each_other(folder: Path, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(folder)
    assert type(base.get_parameter(f"{DOWN.removeprefix('model.')}.weight")) is Known
    base.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        want = base(input_ids=tokens(2, 6)).last_hidden_state
        assert torch.equal(whole.model(input_ids=tokens(2, 6)).last_hidden_state, want)


def test_a_head_is_no_longer_tied_once_it_is_quantized(tmp_path: Path) -> None:
    model = coded(tied=True)
    want = logits(model)
    assert not torch.equal(want, logits(compressed(tied=True)))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), want)
    for each in (model, again):
        each.tie_weights()
        assert type(each.lm_head.weight) is Known


def test_another_dtype_is_refused(folder: Path, tmp_path: Path) -> None:
    refused = r"quantized in torch.float32, but asked for in torch.bfloat16: load it without"
    with pytest.raises(LowrankError, match=refused):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    lowrank.save(net(), tmp_path)
    skeleton = mlp(24, 40, 16)
    before = dict(skeleton.named_parameters())
    with pytest.raises(LowrankError, match=refused):
        lowrank.load(tmp_path, skeleton, dtype=torch.bfloat16)
    assert {n: id(p) for n, p in skeleton.named_parameters()} == {
        n: id(p) for n, p in before.items()
    }
    lowrank.load(tmp_path, skeleton, dtype=torch.float32)


def test_offloading_is_refused(folder: Path, tmp_path: Path) -> None:
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(LowrankError, match=r"lm_head\.weight is quantized and cannot be offload"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)


def test_without_torchao_one_error_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowrank.save(net(), tmp_path)
    monkeypatch.setitem(sys.modules, FILES, None)
    for call in (
        lambda: AutoModelForCausalLM.from_pretrained(folder),
        lambda: lowrank.from_pretrained(folder),
        lambda: lowrank.load(tmp_path, mlp(24, 40, 16)),
        lambda: verify(folder),
    ):
        with pytest.raises(LowrankError, match="pip install torchao"):
            call()


def entry(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda codes: codes[f"{DOWN}.weight"].update(changes)


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a class of somebody's": (entry(type="os.system"), "stores no 'os.system'"),
    "a class that is no weight's": (entry(type="Other"), "stores no 'Other'"),
    "no class": (entry(type=1), "damaged type or options"),
    "no dtype": (entry(options={"dtype": "torch.load"}), "damaged type or options"),
    "torchao's words": (
        entry(options={"of": {"_type": "torch.dtype", "_data": "load"}}), "damaged type",
    ),
    "options that nothing can be built of": (entry(options={}), "no Known can be built"),
    "no tensors": (entry(tensors={}), "'tensors' must map parts"),
    "a negative size": (entry(tensors={"code": ["I8", [-1]]}), "'tensors' must map parts"),
    "more than is known": (entry(more=1), "expected"),
    "no such module": (lambda c: c.update({"model.x.weight": c[f"{DOWN}.weight"]}), "no module"),
    "no such weight": (lambda c: c.update({f"{DOWN}.x": c[f"{DOWN}.weight"]}), "no such weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_entries_that_were_edited(case: str, folder: Path, tmp_path: Path) -> None:
    change, says = DAMAGED[case]
    with pytest.raises(LowrankError, match=says):
        AutoModelForCausalLM.from_pretrained(edited(folder, tmp_path / "out", change))


def test_a_weight_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    sizes = entry(tensors={"code": ["I8", [3, 32]], "scale": ["F32", [3, 1]]})
    target = edited(folder, tmp_path / "out", sizes)
    stored = load_file(target / WEIGHTS)
    for part in ("code", "scale"):
        stored[f"{DOWN}._weight_{part}"] = stored[f"{DOWN}._weight_{part}"][:3].contiguous()
    save_file(stored, target / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(LowrankError, match=re.escape("quantized as [3, 32] instead of [11, 32]")):
        AutoModelForCausalLM.from_pretrained(target)
    with pytest.raises(LowrankError, match=r"down\.weight \[3, 32\] instead of \[11, 32\]"):
        verify(target)


@pytest.mark.parametrize("part", ["code", "scale"])
def test_a_part_that_is_gone(part: str, folder: Path, tmp_path: Path) -> None:
    target = edited(folder, tmp_path / "out", lambda _: None)
    stored = load_file(target / WEIGHTS)
    del stored[f"{DOWN}._weight_{part}"]
    save_file(stored, target / WEIGHTS, metadata={"format": "pt"})
    for load in (AutoModelForCausalLM.from_pretrained, lowrank.from_pretrained):
        with pytest.raises(LowrankError, match=f"the files hold no {part}: damaged file"):
            load(target)
    with pytest.raises(LowrankError, match=f"{part} is None instead of"):
        verify(target)


def test_verify_asks_for_numbers(folder: Path, tmp_path: Path) -> None:
    assert verify(folder).quantized == 27
    target = edited(folder, tmp_path / "out", lambda _: None)
    stored = load_file(target / WEIGHTS)
    stored[f"{DOWN}._weight_scale"].fill_(3e38)  # finite, unlike the product with a code
    save_file(stored, target / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(LowrankError, match=r"up_proj\.down\.weight: NaN or Inf"):
        verify(target)


def test_back_to_numbers(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    want = logits(model)
    dense = lowrank.to_dense(model, copy=True)
    assert type(model.get_parameter(f"{QUERY}.weight")) is Known
    assert {type(p) for p in dense.parameters()} == {nn.Parameter}
    torch.testing.assert_close(logits(dense), want, rtol=1e-4, atol=1e-5)
    lowrank.export(model, tmp_path, "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(dense))


def test_bytes_are_those_of_the_codes() -> None:
    small, large = coded(), compressed()
    codes = [p for p in small.parameters() if type(p) is Known]
    saved = sum(3 * p.numel() - 4 * len(p) for p in codes)
    assert len(codes) == 27
    assert model_cost(small, []).bytes == model_cost(large, []).bytes - saved
    timed = lowrank.benchmark(small, tokens(1, 4), repeats=1)
    assert timed.bytes == model_cost(small, []).bytes
    assert timed.params == model_cost(large, []).params
    assert timed.bytes < timed.peak_bytes < 2 * timed.bytes
