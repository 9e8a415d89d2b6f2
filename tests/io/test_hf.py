"""Stock save_pretrained and from_pretrained round-trip factored models exactly."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import lowrank
from lowrank import LowrankError
from lowrank.io import attach
from lowrank.io.hf import LowRankConfig
from lowrank.methods import Quantized
from lowrank.nn import LowRankLinear, PivotedLinear
from tests.zoo import make, tokens

KINDS = ("llama", "llama-tied", "gpt2", "bert", "mixtral")
Q = "model.layers.0.self_attn.q_proj"


def auto(kind: str):
    import transformers

    name = "SequenceClassification" if kind == "bert" else "CausalLM"
    return getattr(transformers, f"AutoModelFor{name}")


@pytest.fixture(scope="module")
def saved(zoo, tmp_path_factory) -> Path:
    """A factored llama on disk; tests copy its config before they damage it."""
    folder = tmp_path_factory.mktemp("saved")
    zoo.compressed("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(zoo, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = zoo.compressed(kind, dtype)
    model.save_pretrained(tmp_path)
    loaded, info = auto(kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype or not tensor.is_floating_point()
        assert torch.equal(tensor, after[name]), name
    assert torch.equal(zoo.logits(model), zoo.logits(loaded))
    count = sum(isinstance(m, LowRankLinear) for m in loaded.modules())
    assert count == sum(isinstance(m, LowRankLinear) for m in model.modules()) > 0


def test_integers_of_few_bits_round_trip(zoo, tmp_path: Path) -> None:
    """In float32, and cast while it is loaded: codes stay, scales are rounded."""
    from transformers import AutoModelForCausalLM

    model, _ = lowrank.compress(
        make("llama").eval(), 0.25, method=Quantized(forms=("quantized-lowrank",)), unit="bytes",
        data=tokens(8, 12), progress=False,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    lowrank.io.verify(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    before = model.state_dict()
    assert before[f"{Q}.whole.codes"].dtype == before[f"{Q}.up.codes"].dtype == torch.uint8
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(zoo.logits(model), zoo.logits(loaded))
    small = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    for name, tensor in before.items():
        assert torch.equal(small[name], tensor if name.endswith("codes") else tensor.bfloat16())


def test_saved_again_is_the_same(zoo, saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_sharded_and_cast(zoo, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = zoo.compressed("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for parameter in model.parameters():  # not the rotary frequencies, which stay in float32
        parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))


def test_tied_embeddings_stay_tied(zoo, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    zoo.compressed("llama-tied").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_experts_are_left_alone(zoo, tmp_path: Path) -> None:
    model = zoo.compressed("mixtral")
    names = model.config.quantization_config.modules
    assert set(names) == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qo"}
    assert any(p.ndim == 3 for p in model.parameters())


def test_ranks_changed_after_attach_are_saved(zoo, tmp_path: Path) -> None:
    """Rank-adaptive training resizes factors; a checkpoint must say what it holds."""
    from transformers import AutoModelForCausalLM

    model = zoo.compressed("llama")
    old = model.get_submodule(Q)
    new = LowRankLinear.from_factors(old.down.weight[:3], old.up.weight[:, :3], None)
    model.set_submodule(Q, new)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_submodule(Q).rank == 3
    assert torch.equal(zoo.logits(model), zoo.logits(loaded))


def test_layers_merged_by_hand_are_saved_dense(zoo, tmp_path: Path) -> None:
    from lowrank.io.merging import densify

    model = densify(zoo.compressed("llama"))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_flags_of_a_loaded_model(saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved)
    assert not model.is_quantized
    assert not hasattr(model.config, "_is_quantized")
    quantizer = model.hf_quantizer
    assert quantizer.is_compileable
    assert quantizer.is_trainable
    assert quantizer.is_qat_trainable
    assert quantizer.is_serializable()
    assert not quantizer.requires_calibration
    assert all(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.half().parameters()} == {torch.float16}
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}


@pytest.mark.parametrize("reloaded", [False, True])
def test_dequantize_merges(zoo, saved: Path, reloaded: bool) -> None:
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(saved) if reloaded else zoo.compressed("llama")
    expected = zoo.logits(source)
    dense = source.dequantize()
    assert not any(isinstance(m, LowRankLinear) for m in dense.modules())
    assert not hasattr(dense.config, "quantization_config")
    assert not hasattr(dense, "hf_quantizer")
    torch.testing.assert_close(zoo.logits(dense), expected, rtol=1e-4, atol=1e-6)


def test_base_model_from_a_head(saved: Path, zoo, caplog) -> None:
    """Names lose the prefix; the factored head is left out, and this is said."""
    from transformers import AutoModel

    whole = zoo.compressed("llama")
    with caplog.at_level(logging.WARNING, logger="lowrank"):
        base = AutoModel.from_pretrained(saved)
    assert "LlamaModel has no lm_head" in caplog.text
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        got, expected = base(tokens)[0], whole.model(tokens)[0]
    assert torch.equal(got, expected)
    assert "lm_head" not in base.config.quantization_config.modules


def test_other_head_on_a_factored_base(saved: Path, zoo) -> None:
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        saved, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert isinstance(model.get_submodule(Q), LowRankLinear)


def test_base_model_into_a_head(zoo, tmp_path: Path) -> None:
    """Names gain the prefix."""
    from transformers import LlamaForCausalLM

    base = zoo.factor(zoo.make("llama").model, zoo.targets["llama"])
    attach(base)
    base.save_pretrained(tmp_path)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert isinstance(model.get_submodule(Q), LowRankLinear)


# A dense model, compressed as it is loaded


@pytest.fixture
def dense(zoo, tmp_path: Path) -> Path:
    zoo.make("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    "config",
    [
        LowRankConfig(ratio=0.6, progress=False),
        {"quant_method": "lowrank", "ratio": 0.6, "progress": False},
    ],
)
def test_a_dense_model_is_compressed_as_it_is_loaded(
    zoo, dense: Path, tmp_path: Path, config
) -> None:
    model = type(zoo.make("llama")).from_pretrained(dense, quantization_config=config)
    other, report = lowrank.compress(zoo.make("llama"), 0.6, progress=False)
    for (name, ours), (_, wanted) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(ours, wanted), name
    assert model.hf_quantizer.report.achieved == report.achieved
    model.save_pretrained(tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    x = tokens()
    assert torch.equal(again(x).logits, model(x).logits)
    assert again.config.quantization_config.asked() == {}


def test_with_data_and_an_effort(zoo, dense: Path) -> None:
    config = LowRankConfig(ratio=0.7, data=tokens(16, 12), effort="fast", progress=False)
    model = type(zoo.make("llama")).from_pretrained(dense, quantization_config=config)
    assert model.hf_quantizer.report.tokens > 0
    assert any(type(part) is PivotedLinear for part in model.modules())


def test_what_cannot_be_asked_as_it_is_loaded(zoo, dense: Path) -> None:
    load = type(zoo.make("llama")).from_pretrained
    with pytest.raises(LowrankError, match="without a size only says how a factored model"):
        load(dense, quantization_config=LowRankConfig())
    with pytest.raises(LowrankError, match="ratio is the fraction kept and must be"):
        load(dense, quantization_config=LowRankConfig(ratio=7.0))
    with pytest.raises(LowrankError, match="unknown entries effort, perhaps written by a newer"):
        LowRankConfig(effort="fast")


def test_the_config_is_at_the_door() -> None:
    assert lowrank.LowRankConfig is LowRankConfig
    with pytest.raises(AttributeError, match="has no attribute 'LowRank'"):
        _ = lowrank.LowRank
