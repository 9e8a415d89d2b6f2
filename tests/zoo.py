"""Tiny models of many kinds, a tokenizer, and ways to see that a model is as it was."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Calibration, LowrankError
from lowrank.types import Site
from lowrank.walk import layouts

WIDTH, VOCABULARY = 32, 61
SIZE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
FEED = {"intermediate_size": 48}
WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}


def llama(**changes: Any) -> Any:
    import transformers as tf

    config = {**SIZE, **FEED, **WORDS, "num_key_value_heads": 2, **changes}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**config))


def qwen3() -> Any:
    """Norms of queries and keys, whose heads are wider than hidden_size / heads."""
    import transformers as tf

    config = {**SIZE, **FEED, **WORDS, "num_key_value_heads": 2, "head_dim": 12}
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**config))


def gpt2() -> Any:
    import transformers as tf

    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCABULARY, **sizes, **ends))


def bert() -> Any:
    import transformers as tf

    return tf.BertForMaskedLM(tf.BertConfig(**SIZE, **FEED, **WORDS))


def classifier() -> Any:
    import transformers as tf

    config = tf.BertConfig(**SIZE, **FEED, **WORDS, num_labels=5)
    return tf.BertForSequenceClassification(config)


def t5() -> Any:
    import transformers as tf

    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = tf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return tf.T5ForConditionalGeneration(config)


def opt() -> Any:
    import transformers as tf

    return tf.OPTForCausalLM(
        tf.OPTConfig(
            **SIZE, **WORDS, ffn_dim=48, word_embed_proj_dim=WIDTH, do_layer_norm_before=True
        )
    )


def vit() -> Any:
    import transformers as tf

    config = tf.ViTConfig(**SIZE, **FEED, image_size=16, patch_size=8, num_labels=5)
    return tf.ViTForImageClassification(config)


def mixtral() -> Any:
    import transformers as tf

    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZE, **FEED, **WORDS, **experts))


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with a ReLU between them; their names are 0, 2, 4 …"""
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(sizes):
        layers += [nn.Linear(wide, narrow, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "opt": opt, "vit": vit,
    "mixtral": mixtral, "qwen3": qwen3, "classifier": classifier,
}  # fmt: skip


@functools.cache
def _built(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILDERS[kind]().eval()


def make(kind: str) -> Any:
    """A fresh copy of a tiny model, in eval mode, always with the same weights."""
    return copy.deepcopy(_built(kind))


def tokens(rows: int = 2, length: int = 7, start: int = 0) -> Tensor:
    """(rows, length) token ids from 2 on."""
    return (torch.arange(rows * length).reshape(rows, length) * 7 + start) % (VOCABULARY - 2) + 2


def example(kind: str) -> Any:
    """A batch that the model of that kind takes."""
    if kind == "vit":
        return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    if kind == "t5":
        return {"input_ids": tokens(), "labels": tokens(2, 5)}
    return tokens()


class Tokenizer:
    """One token per letter; called as a tokenizer of transformers is."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % (VOCABULARY - 2) + 2 for letter in text]}


class Custom(nn.Module):
    """A module that runs `call(self, *args)`, for models that no library has."""

    def __init__(self, call: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


def inputs_of(model: nn.Module, names: list[str], run: Callable[[], object]) -> dict[str, Any]:
    """What each named layer was given, as float64 rows: an oracle by plain hooks and numpy."""
    seen: dict[str, list[Any]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].append(args[0].detach().double().numpy().reshape(-1, args[0].shape[-1]))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(rows) if rows else None for name, rows in seen.items()}


def by_name(sites: list[Site]) -> dict[str, Site]:
    return {site.name: site for site in sites}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed call must not change: modules, tensors, bytes, flags, config."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    config = getattr(model, "config", None)
    return {
        "modules": [(n, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "held": [(n, id(t), t.requires_grad, id(t.grad)) for n, t in tensors.items()],
        "bytes": {
            n: t.detach().contiguous().view(torch.uint8).numpy().tobytes()
            for n, t in tensors.items()
            if not t.is_meta and t.ndim
        },
        "config": config.to_dict() if hasattr(config, "to_dict") else None,
        "random": torch.get_rng_state().numpy().tobytes(),
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model, and the global random state, are bit for bit as before."""
    before = state_of(model)
    yield
    after = state_of(model)
    for part, value in before.items():
        assert after[part] == value, part


def refused(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    """The message with which compress refuses."""
    return refusal(lambda: lowrank.compress(model, *args, **kwargs, progress=False), model)


def refusal(call: Callable[[], object], model: nn.Module) -> str:
    """The message with which a call refuses: one line, the model bit for bit as it was."""
    with unchanged(model), pytest.raises(LowrankError) as caught:
        call()
    return said(caught)


def said(caught: pytest.ExceptionInfo[LowrankError]) -> str:
    """The message, which has to be one readable line."""
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight (out, in) of every dense linear layer, copied."""
    found = {n: m for n, m in model.named_modules() if layouts.kind(m) == "linear"}
    return {name: layouts.matrix(module).detach().clone() for name, module in found.items()}


def calibration(model: nn.Module, data: Any, **options: Any) -> Calibration:
    return lowrank.calibrate(model, data, progress=False, **options)


def numbers(model: nn.Module) -> int:
    """Parameters of the linear layers, factored or not, biases excluded."""
    return sum(
        p.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) for p in (m.weight,)
    )
