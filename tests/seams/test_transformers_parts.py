"""Whatever part was compressed and whatever part is saved, the folder loads whole or in part."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.nn import is_factored
from lowrank.train import DLRT, CondLR, Maestro
from tests import architectures, zoo

IDS = torch.arange(20).reshape(2, 10)
RUN: dict[str, Any] = {"data": None, "progress": False}


def first(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


def away(one: nn.Module, other: nn.Module, **inputs: torch.Tensor) -> float:
    """Largest difference of the outputs; both hold factors, so that 0 means the same factors."""
    assert any(map(is_factored, one.modules()))
    assert any(map(is_factored, other.modules()))
    with torch.no_grad():
        outputs = [first(model.eval()(**(inputs or {"input_ids": IDS}))) for model in (one, other)]
    return float((outputs[0] - outputs[1]).abs().max())


class Wrapper(nn.Module):
    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm(input_ids=ids).logits


def each_layer(model: nn.Module) -> None:
    for layer in model.model.layers:
        lowrank.compress(layer, 0.5, **RUN)


def each_linear(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp.up_proj, _ = lowrank.compress(layer.mlp.up_proj, 0.5, **RUN)


WAYS: dict[str, Callable[[Any], Any]] = {
    "the base model": lambda model: lowrank.compress(model.model, 0.5, **RUN),
    "each layer": each_layer,
    "each linear layer": each_linear,
    "inside torch.compile": lambda model: lowrank.compress(torch.compile(model), 0.5, **RUN),
    "inside DataParallel": lambda model: lowrank.compress(nn.DataParallel(model), 0.5, **RUN),
    "inside a module of one's own": lambda model: lowrank.compress(Wrapper(model), 0.5, **RUN),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_holds_the_compressed_part_is_saved_whole(way: str, tmp_path: Path) -> None:
    model = zoo.llama().eval()
    WAYS[way](model)
    model.save_pretrained(tmp_path)
    assert away(model, tf.AutoModelForCausalLM.from_pretrained(tmp_path)) == 0
    assert away(model, lowrank.from_pretrained(tmp_path)) == 0


def test_each_save_names_the_layers_as_in_its_own_folder(tmp_path: Path) -> None:
    """The whole, then the part, then the whole: one config object is shared by both."""
    model = zoo.llama().eval()
    lowrank.compress(model.model, 0.5, **RUN)
    for folder, part in (("a", model), ("b", model.model), ("c", model)):
        part.save_pretrained(tmp_path / folder)
        declared = json.loads((tmp_path / folder / "config.json").read_text())
        named = declared["quantization_config"]["modules"]
        assert {n.startswith("model.layers.") for n in named} == {part is model}
    assert away(model.model, tf.AutoModel.from_pretrained(tmp_path / "b")) == 0
    assert away(model, tf.AutoModelForCausalLM.from_pretrained(tmp_path / "c")) == 0


def test_a_base_model_of_a_folder_with_a_head_and_the_reverse(tmp_path: Path) -> None:
    model, _ = lowrank.compress(zoo.llama().eval(), 0.5, **RUN)
    model.save_pretrained(tmp_path / "head")
    base = tf.AutoModel.from_pretrained(tmp_path / "head")
    assert away(base, model.model) == 0
    base.save_pretrained(tmp_path / "base")
    again, info = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", output_loading_info=True
    )
    assert away(base, again.model) == 0
    assert info["missing_keys"] == {"lm_head.weight"}  # no guard is reported
    assert not info["unexpected_keys"]


def test_the_encoder_of_t5(tmp_path: Path) -> None:
    model = zoo.make("t5").eval()
    lowrank.compress(model.encoder, 0.5, **RUN)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert away(model, again, input_ids=IDS, decoder_input_ids=IDS) == 0
    assert away(model.encoder, tf.T5EncoderModel.from_pretrained(tmp_path)) == 0


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL["num_attention_heads"] = 4
VISION = {**SMALL, "image_size": 16, "patch_size": 8}


def test_the_language_model_of_a_vision_language_model(tmp_path: Path) -> None:
    text = tf.LlamaConfig(**SMALL, vocab_size=64)
    vision = tf.CLIPVisionConfig(**VISION)
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    model = tf.LlavaForConditionalGeneration(config).eval()
    lowrank.compress(model.model.language_model, 0.5, **RUN)
    model.save_pretrained(tmp_path)
    assert away(model, tf.AutoModelForImageTextToText.from_pretrained(tmp_path)) == 0


def test_a_tower_of_clip_alone(tmp_path: Path) -> None:
    """A part's config is cut out of the whole one, and its names differ from those in the file."""
    ends = {"vocab_size": 64, "eos_token_id": 2, "bos_token_id": 1}
    config = tf.CLIPConfig(text_config={**SMALL, **ends}, vision_config=VISION, projection_dim=16)
    model, _ = lowrank.compress(tf.CLIPModel(config).eval(), 0.5, **RUN)
    model.save_pretrained(tmp_path / "clip")
    assert "quantization_config" not in vars(model.config.text_config)
    pixels = torch.randn(2, 3, 16, 16)
    text = tf.CLIPTextModel.from_pretrained(tmp_path / "clip")
    assert away(model.text_model, text) == 0
    for vision in (
        tf.CLIPVisionModel.from_pretrained(tmp_path / "clip"),
        lowrank.from_pretrained(tmp_path / "clip", "CLIPVisionModel"),
    ):
        assert away(model.vision_model, vision, pixel_values=pixels) == 0
        vision.save_pretrained(tmp_path / "vision")
        again = tf.AutoModel.from_pretrained(tmp_path / "vision")
        assert away(vision, again, pixel_values=pixels) == 0


@pytest.mark.parametrize("controller", [DLRT, CondLR, Maestro])
def test_what_training_leaves_is_declared(controller: Any, tmp_path: Path) -> None:
    model = zoo.llama()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    control = controller(model, optimizer)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        control.before_step()
        optimizer.step()
        control.after_step()
        optimizer.zero_grad()
    model = control.finish().eval()
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_tie_that_a_part_broke_is_refused_when_saved(tmp_path: Path) -> None:
    """Factoring the embedding alone leaves a head that the config ties to it."""
    model = zoo.llama(tie_word_embeddings=True).eval()
    lowrank.compress(model.model, 0.5, target_modules="all", **RUN)
    with pytest.raises(LowrankError, match=r"model.embed_tokens is factored, but the config ties"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_densified_it_says_nothing_of_factors(tmp_path: Path) -> None:
    model = zoo.llama().eval()
    lowrank.compress(model.model, 0.5, **RUN)
    model = lowrank.to_dense(model)
    model.save_pretrained(tmp_path)
    assert "lowrank" not in (tmp_path / "config.json").read_text()


def test_stock_save_writes_card_and_remote_code(tmp_path: Path) -> None:
    model, _ = lowrank.compress(zoo.llama(), 0.5, **RUN)
    model.save_pretrained(tmp_path)
    assert "compressed by lowrank" in (tmp_path / "README.md").read_text()
    config = json.loads((tmp_path / "config.json").read_text())
    module, name = config["auto_map"]["AutoModelForCausalLM"].split(".")
    assert name in (tmp_path / f"{module}.py").read_text()
    assert not hasattr(model.config, "auto_map")  # of the folder, not of the model


def test_the_card_tells_what_was_done_and_to_which_model(tmp_path: Path) -> None:
    model = zoo.llama()
    model.config.name_or_path = "someone/dense-model"
    model, report = lowrank.compress(model, 0.5, **RUN)
    model.save_pretrained(tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: someone/dense-model\n")
    assert [line for line in report.summary() if line not in card] == []
    rows = [f"| {row['site']} | {row['shape']} |" for row in report.rows()]
    assert len(rows) > 10
    assert [row for row in rows if row not in card] == []
    copy.deepcopy(model).save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "README.md").read_text() == card


def test_a_folder_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zoo.llama().save_pretrained("some/folder")
    model = lowrank.from_pretrained("some/folder")
    lowrank.compress(model, 0.5, **RUN)[0].save_pretrained("out")
    assert "base_model" not in Path("out/README.md").read_text()


def test_a_card_of_ones_own_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    model, _ = lowrank.compress(zoo.llama(), 0.5, **RUN)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_state_dict_that_is_given_is_what_is_saved(tmp_path: Path) -> None:
    """As the Trainer does under FSDP, where the model itself holds slices."""
    model, _ = lowrank.compress(zoo.llama(), 0.5, **RUN)
    given = {key: value + 1 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    for key, value in again.state_dict().items():
        assert torch.equal(value, given[key])


@pytest.mark.parametrize("family", ["nomic_bert", "gte"])
def test_factors_of_layers_that_a_file_joins_stay_apart(family: str, tmp_path: Path) -> None:
    """transformers joins q, k and v of these into one weight when it saves them."""
    one = architectures.family_of(family)
    assert one is not None
    batch = one.batch(0)
    model, _ = lowrank.compress(one.build(), 0.5, effort="fast", data=[batch], progress=False)
    model.save_pretrained(tmp_path)
    again = getattr(tf, one.cls).from_pretrained(tmp_path).eval()
    found, expected = (architectures.outputs(m, batch) for m in (again, model))
    torch.testing.assert_close(found, expected)


@pytest.fixture
def undeclared(tmp_path: Path) -> Path:
    """A folder whose config.json forgot, as of a copy or of a tool that rewrites it."""
    model, _ = lowrank.compress(zoo.llama(), 0.5, **RUN)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    return tmp_path


def test_without_a_declaration_transformers_raises(undeclared: Path) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tf.AutoModelForCausalLM.from_pretrained(undeclared)


@pytest.mark.parametrize(
    "more", [{}, {"ignore_mismatched_sizes": True}, {"auto_class": "AutoModel"}]
)
def test_random_weights_are_never_returned(undeclared: Path, more: dict[str, Any]) -> None:
    with pytest.raises(LowrankError, match=r"holds factors of .*_proj .*does not say so"):
        lowrank.from_pretrained(undeclared, **more)


def test_factors_without_guards_are_noticed_too(undeclared: Path) -> None:
    """A file that another tool wrote from a state dict."""
    from safetensors.torch import load_file, save_file

    path = undeclared / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if v.numel() > 1}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(LowrankError, match=r"holds factors of .*_proj .*does not say so"):
        lowrank.from_pretrained(undeclared)


def test_tensors_of_other_tools_beside_a_weight_are_none_of_ours(tmp_path: Path) -> None:
    """Scales, say: transformers warns of them, and the weights are all there."""
    from safetensors.torch import load_file, save_file

    model = zoo.llama()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    save_file({**load_file(path), **scale}, path, {"format": "pt"})
    again = lowrank.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_guards_are_passed_over_in_silence(tmp_path: Path) -> None:
    model, _ = lowrank.compress(zoo.llama(), 0.5, **RUN)
    model.save_pretrained(tmp_path)
    _, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_a_part_that_is_tied_whole_keeps_its_factors_in_both_places(
    storage: str, tmp_path: Path
) -> None:
    """Two blocks with one transformer; transformers ties all of its tensors by a pattern."""
    from transformers import Zamba2Config, Zamba2ForCausalLM

    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, n_mamba_heads=4, mamba_d_state=4, mamba_headdim=8, mamba_ngroups=1,
        chunk_size=4, num_mem_blocks=1, adapter_rank=4, use_mamba_kernels=False,
        hybrid_layer_ids=[0, 2], layers_block_type=["hybrid", "mamba", "hybrid"],
    )  # fmt: skip
    model = Zamba2ForCausalLM(config).eval()
    lean, report = lowrank.compress(
        model, 0.6, data=None, method="svd", storage=storage, progress=False
    )
    assert report.achieved <= 0.6
    lean.save_pretrained(tmp_path)
    again = Zamba2ForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(2, 18).reshape(2, 8)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, lean(ids).logits)
    first, second = (again.model.layers[i].shared_transformer.feed_forward for i in (0, 2))
    tensors = first.state_dict()
    assert all(torch.equal(t, tensors[name]) for name, t in second.state_dict().items())


def test_pipelines_take_a_folder_or_the_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(zoo.VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w0")
    model, _ = lowrank.compress(zoo.make("llama"), 0.5, **RUN)
    lowrank.save(model, tmp_path, tokenizer=tokenizer)
    ids = model.generate(tokenizer("w5 w9 w7", return_tensors="pt").input_ids, max_new_tokens=4)
    asked = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    for given in ({"model": str(tmp_path)}, {"model": model, "tokenizer": tokenizer}):
        writer = tf.pipeline("text-generation", **given)
        said = writer("w5 w9 w7", **asked)[0]["generated_text"]
        assert said == tokenizer.decode(ids[0, 3:])
