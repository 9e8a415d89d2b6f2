"""transformers' Trainer and trl's SFTTrainer train, stop, resume and save factored models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import lowrank
from lowrank.nn import is_factored
from tests.trainers import compressed, trainer
from tests.zoo import tokens

IDS = tokens(2, 8)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def loaded(folder: Path | str) -> Any:
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    assert any(map(is_factored, model.modules()))
    return model


@pytest.mark.parametrize("form", ["factors", "tied table"])
def test_it_resumes_and_takes_the_best_checkpoint(form: str, tmp_path: Path) -> None:
    """The best one is here the worst: the one of half-time, which the last would not equal."""
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "greater_is_better": True}
    model = compressed(form)
    made = trainer(
        model, tmp_path, metric_for_best_model="eval_loss", max_steps=4, **saving, **best
    )
    made.train()
    losses = [line["eval_loss"] for line in made.state.log_history if "eval_loss" in line]
    assert losses[1] < losses[0] < 4.2
    half, whole = (loaded(tmp_path / f"checkpoint-{step}") for step in (2, 4))
    assert float((logits(half) - logits(whole)).abs().max()) > 1e-3
    assert torch.equal(logits(made.model), logits(half))

    again = trainer(compressed(form), tmp_path / "again", max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(again.model), logits(whole))
    again.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(loaded(tmp_path / "saved")), logits(again.model))


def test_a_checkpoint_is_trained_on_compiled(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path / "compressed")
    after = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        made = trainer(loaded(tmp_path / "compressed"), tmp_path, max_steps=2, **options)
        made.train()
        made.save_model(str(tmp_path / "saved"))
        after.append(logits(loaded(tmp_path / "saved")))
    torch._dynamo.reset()
    torch.testing.assert_close(after[1], after[0], rtol=1e-4, atol=1e-5)
    assert float((after[0] - logits(compressed())).abs().max()) > 1e-3


def test_sft_trainer(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"?": 0, "<end>": 1, "low": 2, "rank": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "?", "eos_token": "<end>", "pad_token": "<end>"}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    settings = trl.SFTConfig(
        str(tmp_path), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
        save_strategy="no", logging_steps=1, learning_rate=1e-2, per_device_train_batch_size=2,
    )  # fmt: skip
    texts = datasets.Dataset.from_dict({"text": ["low rank low rank", "rank low", "low low"] * 2})
    model = compressed()
    before = logits(model)
    made = trl.SFTTrainer(model, settings, train_dataset=texts, processing_class=tokenizer)
    made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert float((logits(model) - before).abs().max()) > 1e-3
    made.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(loaded(tmp_path / "saved")), logits(model))
    lowrank.save(model, tmp_path / "own")
    assert torch.equal(logits(lowrank.from_pretrained(tmp_path / "own")), logits(model))
