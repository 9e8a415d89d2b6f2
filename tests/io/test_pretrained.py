"""Folders of transformers models through save, load and from_pretrained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank.errors import LowrankError
from lowrank.io import from_pretrained, load, save, skeleton
from lowrank.io.verifying import verify

WEIGHTS = "model.safetensors"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_a_save_replaces_shards_and_whole_files(zoo, tmp_path: Path) -> None:
    """transformers keeps the one that is not written, and loads it in the place of the new."""
    model = zoo.compressed("llama")
    for size in ("20KB", "1GB", "20KB", "1GB"):
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert (tmp_path / WEIGHTS).exists() == (size == "1GB")
        assert (tmp_path / f"{WEIGHTS}.index.json").exists() == (size == "20KB")
        verify(tmp_path)
        assert torch.equal(zoo.logits(from_pretrained(tmp_path)), zoo.logits(model))


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_transformers_folder(zoo, tmp_path: Path, kind: str) -> None:
    model = zoo.compressed(kind)
    save(model, tmp_path, card="| site | rank |\n|---|---|\n| q_proj | 6 |")
    for loaded in (load(tmp_path), from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert torch.equal(zoo.logits(loaded), zoo.logits(model))
    card = (tmp_path / "README.md").read_text()
    for text in ("import lowrank", "loading fails", "trust_remote_code", "| q_proj | 6 |"):
        assert text in card
    name = "AutoModelForSequenceClassification" if kind == "bert" else "AutoModelForCausalLM"
    assert f"from transformers import {name}\n" in card
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"][name] == f"modeling_lowrank.LowRank{type(model).__name__}"
    assert not hasattr(model.config, "auto_map")


def test_transformers_folder_dtype_class_and_tokenizer(zoo, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    save(zoo.compressed("llama"), tmp_path, tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path)("b a").input_ids == tokenizer("b a").input_ids
    loaded = load(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    base = from_pretrained(tmp_path, "AutoModel", dtype=torch.float16)
    assert type(base).__name__ == "LlamaModel"
    assert base.dtype == torch.float16
    model, info = from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set()
    with pytest.raises(LowrankError, match="transformers has no class 'AutoNothing'"):
        from_pretrained(tmp_path, "AutoNothing")
    with pytest.raises(LowrankError, match="needs no skeleton: drop it"):
        load(tmp_path, model)


def test_dense_transformers_model_gets_no_card(zoo, tmp_path: Path) -> None:
    save(zoo.make("llama"), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", WEIGHTS} <= names
    assert not names & {"README.md", "modeling_lowrank.py"}
    assert type(load(tmp_path)).__name__ == "LlamaForCausalLM"


def test_card_of_somebody_else_is_kept(zoo, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# mine")
    save(zoo.compressed("llama"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine"


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) - 40])


def set_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda f: edit_weights(f, lambda tensors: tensors.update({name: tensor}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "cannot load .*SafetensorError"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "cannot load .*OSError"),
    "no config": (lambda f: (f / "config.json").unlink(), "neither lowrank.json nor config.json"),
    "config no json": (lambda f: (f / "config.json").write_text("{"), "cannot load .*JSON"),
    "tensor missing": (
        lambda f: edit_weights(f, lambda t: t.pop("model.layers.0.self_attn.q_proj.up.weight")),
        "do not fit config.json; missing: model.layers.0.self_attn.q_proj.up.weight",
    ),
    "tensor too many": (set_tensor("more", torch.ones(1)), "unexpected: more"),
    "other shape": (
        set_tensor("model.layers.0.self_attn.q_proj.up.weight", torch.ones(32, 7)),
        "do not fit config.json; of another shape: model.layers.0.self_attn.q_proj.up.weight",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_wrong_transformers_folder_is_one_error(zoo, tmp_path: Path, what: str) -> None:
    save(zoo.compressed("llama"), tmp_path)
    damage, message = DAMAGE[what]
    damage(tmp_path)
    with pytest.raises(LowrankError, match=message):
        load(tmp_path)


def test_one_folder_holds_one_form(net: nn.Module, zoo, tmp_path: Path) -> None:
    save(net, tmp_path)
    model = zoo.compressed("llama")
    with pytest.raises(LowrankError, match=r"holds another checkpoint \(lowrank.json\)"):
        save(model, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_a_skeleton_needs_the_config_alone(zoo, tmp_path: Path, kind: str) -> None:
    model = zoo.make(kind).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    empty = skeleton(tmp_path)
    assert type(empty) is type(model)
    assert not empty.training
    found = {name: (p.shape, p.dtype, p.is_meta) for name, p in empty.named_parameters()}
    assert found == {name: (p.shape, p.dtype, True) for name, p in model.named_parameters()}


def test_no_skeleton_of_what_is_no_dense_model(zoo, tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match="is no folder of a transformers model"):
        skeleton(tmp_path)
    save(zoo.compressed("llama"), tmp_path)
    with pytest.raises(LowrankError, match="is quantized or factored already"):
        skeleton(tmp_path)
