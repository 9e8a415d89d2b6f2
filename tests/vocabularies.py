"""A tokenizer of as many tokens as the tiny models have, and models whose tables are factored."""

from __future__ import annotations

import copy
import functools
import string
from typing import Any

import torch
from torch import Tensor

import lowrank
from tests.zoo import VOCABULARY, llama, make

WORDS = ["cat", "dog", "sat", "ran", "the", "hat", "red", "bed", "##at", "##er"]
NEW = ["hatbed", "sater", "zzz"]  # hat ##b ##e ##d, sat ##er, and unknown letters


def tokenizer(spare: int = 0) -> Any:
    """WordPiece over letters without z, of VOCABULARY − `spare` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase[:25]
    every = ["[UNK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    ids = {word: i for i, word in enumerate(every[: VOCABULARY - spare])}
    assert len(ids) == VOCABULARY - spare
    inner = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@functools.cache
def _made(kind: str) -> Any:
    torch.manual_seed(0)
    tied = kind in ("tied", "dense tied")
    model = make(kind) if kind in ("bert", "t5") else llama(tie_word_embeddings=tied)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zeros would hide what becomes of them
            torch.nn.init.normal_(parameter)
    model = model.eval()
    if kind.startswith("dense"):
        return model
    return lowrank.compress(model, 0.6, data=None, target_modules="all", progress=False)[0]


def model_of(kind: str) -> Any:
    """A copy of "tied", "untied", "bert", "t5", "dense tied" or "dense untied"."""
    return copy.deepcopy(_made(kind))


def logits(model: Any, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found
