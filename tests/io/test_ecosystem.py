"""Trainer, generate, torch.compile's flag and peft accept a factored model that was reloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank.errors import LowrankError
from lowrank.io import to_dense


@pytest.fixture
def reloaded(zoo, tmp_path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    zoo.compressed("llama").save_pretrained(tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [False, True])
def test_trainer_trains_and_its_checkpoint_loads(zoo, reloaded, tmp_path, in_memory: bool) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = zoo.compressed("llama") if in_memory else reloaded
    before = model.lm_head.down.weight.detach().clone()
    tokens = torch.arange(8) + 3
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            save_steps=2,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": tokens, "labels": tokens}] * 4,
    )
    trainer.train()
    assert not torch.equal(model.lm_head.down.weight, before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert torch.equal(zoo.logits(loaded), zoo.logits(model.eval()))


def test_generate(reloaded: nn.Module, zoo) -> None:
    tokens = torch.arange(6)[None] + 2
    expected = zoo.compressed("llama").generate(tokens, max_new_tokens=5, do_sample=False)
    got = reloaded.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, expected)
    assert got.shape[1] > tokens.shape[1]


def test_peft_lora_on_the_factors(reloaded: nn.Module, zoo) -> None:
    peft = pytest.importorskip("peft")
    expected = zoo.logits(reloaded)
    targets = ["q_proj.down", "q_proj.up", "lm_head.up"]
    model = peft.get_peft_model(
        reloaded, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    ).eval()
    assert sum(name.endswith("lora_A") for name, _ in model.named_modules()) == 5
    adapted = zoo.logits(model)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    check = zoo.snapshot(reloaded)
    with pytest.raises(LowrankError, match=r"q_proj holds more than its factors: down\.base_layer"):
        to_dense(reloaded)
    check()
    merged = model.merge_and_unload()
    torch.testing.assert_close(zoo.logits(merged), adapted, rtol=1e-4, atol=1e-5)
    dense = to_dense(merged)
    torch.testing.assert_close(zoo.logits(dense), adapted, rtol=1e-4, atol=1e-5)


def test_layers_offloaded_to_disk(zoo, tmp_path: Path) -> None:
    """The factors have real names in the file, so accelerate finds them; merging is refused."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    model = zoo.compressed("llama")
    model.save_pretrained(tmp_path / "model")
    inner = dict.fromkeys(("embed_tokens", "norm", "rotary_emb"), "cpu") | {"layers": "disk"}
    places = {f"model.{name}": place for name, place in inner.items()} | {"lm_head": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[0].self_attn.q_proj.up.weight.is_meta
    assert torch.equal(zoo.logits(loaded), zoo.logits(model))
    with pytest.raises(LowrankError, match=r"cannot merge model\.layers\.0"):
        to_dense(loaded)
