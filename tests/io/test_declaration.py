"""What the config of a transformers model says about its factored modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.io import attach, detach, save


def test_attach_writes_specs_and_provenance(zoo) -> None:
    model = zoo.factor(zoo.make("llama"), ("q_proj",))
    assert attach(model, {"ratio": 0.6})
    written = model.config.quantization_config.to_dict()
    spec = {"type": "LowRankLinear", "in_features": 32, "out_features": 32, "rank": 6}
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert written["modules"] == {name: {**spec, "bias": False} for name in names}
    assert (written["quant_method"], written["version"]) == ("lowrank", 1)
    assert written["lowrank"] == {
        "ratio": 0.6, "lowrank_version": lowrank.__version__, "saved_as": "LlamaForCausalLM",
    }  # fmt: skip


def test_attach_again_follows_the_model_and_keeps_provenance(zoo) -> None:
    model = zoo.factor(zoo.make("llama"), ("q_proj",))
    attach(model, {"ratio": 0.6})
    attach(zoo.factor(model, ("k_proj",)))
    entry = model.config.quantization_config
    assert len(entry.modules) == 4
    assert entry.lowrank["ratio"] == 0.6
    assert model.hf_quantizer.quantization_config is entry


def test_conv1d_layout_is_noted(zoo) -> None:
    model = zoo.compressed("gpt2")
    assert {s.get("layout") for s in model.config.quantization_config.modules.values()} == {
        "conv1d"
    }


def test_detach_leaves_the_config_as_it_was(zoo) -> None:
    model = zoo.make("llama")
    before = model.config.to_dict()
    attach(zoo.factor(model, ("q_proj",)))
    detach(model)
    assert model.config.to_dict() == before
    assert not hasattr(model, "hf_quantizer")
    detach(model)


def test_nothing_factored_nothing_said(zoo) -> None:
    model = zoo.make("llama")
    check = zoo.snapshot(model)
    assert not attach(model)
    check()


def test_attach_after_merging_by_hand_detaches(zoo) -> None:
    from lowrank.io.merging import densify

    model = zoo.compressed("llama")
    assert not attach(densify(model))
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")


def test_any_other_module_is_left_alone(net: nn.Module, zoo) -> None:
    check = zoo.snapshot(net)
    assert not attach(net)
    detach(net)
    check()


@pytest.mark.parametrize("entry", [{"quant_method": "gptq", "bits": 4}, {"bits": 4}])
def test_other_quantization_is_refused(zoo, tmp_path, entry: dict) -> None:
    model = zoo.factor(zoo.make("llama"), ("q_proj",))
    model.config.quantization_config = entry
    check = zoo.snapshot(model)
    for act in (attach, lambda m: save(m, tmp_path / "out")):
        with pytest.raises(LowrankError, match="is already quantized by"):
            act(model)
    check()
    assert not (tmp_path / "out").exists()
    detach(model)
    check()


def test_other_quantizer_object_is_refused(zoo) -> None:
    from transformers import BitsAndBytesConfig

    model = zoo.factor(zoo.make("llama"), ("q_proj",))
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(LowrankError, match="already quantized by 'bitsandbytes'"):
        attach(model)


def test_factored_tied_head_is_refused_until_untied(zoo, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = zoo.factor(zoo.make("llama-tied"), ("lm_head",))
    check = zoo.snapshot(model)
    with pytest.raises(LowrankError, match="lm_head is factored, but the config ties lm_head"):
        attach(model)
    check()
    model.config.tie_word_embeddings = False
    assert attach(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))


def test_provenance_must_be_json(zoo) -> None:
    model = zoo.factor(zoo.make("llama"), ("q_proj",))
    check = zoo.snapshot(model)
    with pytest.raises(LowrankError, match="provenance must be JSON"):
        attach(model, {"plan": torch.ones(1)})
    check()


def test_deep_copy_is_independent(zoo) -> None:
    model = zoo.compressed("llama")
    twin = copy.deepcopy(model)
    assert twin.hf_quantizer.quantization_config is twin.config.quantization_config
    detach(twin)
    assert model.config.quantization_config.modules
