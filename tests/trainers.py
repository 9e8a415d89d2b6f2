"""transformers' Trainer on a few rows of tokens, for tests of what trains there."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowrank

from .zoo import llama, tokens

OURS = ["q_proj", "o_proj", "up_proj"]  # what is compressed; the others stay dense
FORMS: dict[str, dict[str, Any]] = {
    "factors": {"method": "svd", "target_modules": OURS},
    "pivoted": {"method": "svd", "storage": "pivoted", "target_modules": OURS},
    "coded": {"method": "dense-sparse", "target_modules": OURS},
    "tied table": {"method": "svd", "target_modules": "all"},
}

QUIET: dict[str, Any] = {
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
    "save_strategy": "no", "learning_rate": 1e-2, "per_device_train_batch_size": 2,
}  # fmt: skip


@cache
def _compressed(form: str) -> Any:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=form == "tied table").eval()
    data = [tokens(8, 32)] if form == "coded" else None
    return lowrank.compress(model, 0.6, data=data, progress=False, **FORMS[form])[0]


def compressed(form: str = "factors") -> Any:
    """A fresh copy of a small Llama, compressed once."""
    return copy.deepcopy(_compressed(form))


def rows(count: int = 8, length: int = 8) -> list[dict[str, torch.Tensor]]:
    """Token ids and labels, for a causal language model."""
    return [{"input_ids": row, "labels": row} for row in tokens(count, length)]


def trainer(model: nn.Module, folder: Path, *, callbacks: Any = (), **options: Any) -> Any:
    """A Trainer of two epochs of four steps; options are those of TrainingArguments."""
    import transformers as tf

    settings = {**QUIET, "num_train_epochs": 2, **options}
    made = tf.Trainer(
        model,
        tf.TrainingArguments(str(folder), **settings),
        train_dataset=rows(),
        eval_dataset=rows(2),
        callbacks=list(callbacks),
    )
    made.remove_callback(tf.trainer_callback.PrinterCallback)
    return made
