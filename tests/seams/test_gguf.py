"""A model that transformers dequantised from GGUF is a dense one, whatever its config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.walk.checks import mark_of
from lowrank.walk.quantized import is_dense
from tests.zoo import llama, tokens, unchanged

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(path: Path, model: Any) -> None:
    """The file that llama.cpp would make of a tiny Llama, its matrices in eight bits."""
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bits = gguf.GGMLQuantizationType.Q8_0
    for key, value in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        for ours, theirs in NAMES.items():
            key = key.replace(ours, theirs)
        if value.ndim == 2:
            writer.add_tensor(key, gguf.quantize(value.numpy(), bits), raw_dtype=bits)
        else:
            writer.add_tensor(key, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def loaded(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    write(tmp_path / "m.gguf", llama(intermediate_size=64, tie_word_embeddings=True))
    given = {"gguf_file": "m.gguf", "dtype": torch.float32}
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, **given).eval()
    assert model.config.quantization_config.quant_method == "gguf"
    assert model.is_quantized
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 6)).logits


@pytest.mark.parametrize("targets", ["all-linear", "all"])
def test_it_is_compressed_and_saved(loaded: Any, targets: str, tmp_path: Path) -> None:
    assert is_dense(loaded)
    data = [tokens(8, 16)]
    model, _ = lowrank.compress(loaded, 0.6, data=data, target_modules=targets, progress=False)
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "stock")
    lowrank.save(model, tmp_path / "ours")
    for folder in ("stock", "ours"):
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again), logits(model))
    dense = lowrank.to_dense(model)
    dense.save_pretrained(tmp_path / "dense")
    assert "quant" not in (tmp_path / "dense" / "config.json").read_text()
    model.half()


def test_a_part_of_it_is_compressed_and_the_whole_saved(loaded: Any, tmp_path: Path) -> None:
    lowrank.compress(loaded.model, 0.6, data=None, progress=False)
    loaded.save_pretrained(tmp_path / "out")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(loaded))


def test_a_mark_that_no_quantizer_acted_on_is_believed() -> None:
    model = llama()
    model.config.quantization_config = {"quant_method": "gguf"}
    with unchanged(model), pytest.raises(LowrankError, match=r"the model is quantized \(gguf\)"):
        lowrank.compress(model, 0.6, data=None)


def test_dense_it_is_saved_too(loaded: Any, tmp_path: Path) -> None:
    want = logits(loaded)
    lowrank.save(loaded, tmp_path / "out")
    assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), want)


class Packed(nn.Linear):
    """A layer whose weight is a float, but which computes with fewer bits."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def codes(model: Any, name: str) -> None:
    """Make the first layer of a marked model one that holds or uses codes."""
    layer = model.model.layers[0].mlp.up_proj
    if name == "int8 weight":
        layer.weight = nn.Parameter(layer.weight.detach().char(), requires_grad=False)
    elif name == "float8 weight":
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), False)
    elif name == "scales beside it":
        layer.register_buffer("weight_scale", torch.ones(1))
    elif name == "codes in a buffer":
        model.model.layers[0].register_buffer("codes", torch.zeros(4, 4, dtype=torch.int32))
    elif name == "a patch":
        layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight)
    else:
        layer.__class__ = Packed


@pytest.mark.parametrize(
    "case",
    ["int8 weight", "float8 weight", "scales beside it", "codes in a buffer", "a patch", "a class"],
)
def test_what_is_marked_and_holds_codes_is_refused(loaded: Any, case: str) -> None:
    """The mark alone says nothing, nor does its name."""
    codes(loaded, case)
    assert mark_of(loaded) == "gguf"
    with unchanged(loaded), pytest.raises(LowrankError, match=r"the model is quantized \(gguf\)"):
        lowrank.compress(loaded, 0.6, data=None)
