"""Tiny models of several kinds, factored by hand, and processes of their own for import orders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import lowrank  # noqa: F401  (before transformers: the finder is what registers)
from lowrank.nn import LowRankLinear, remember_layout
from lowrank.walk import layouts

REPO = Path(__file__).parents[2]
RANK = 6
KINDS = ("llama", "llama-tied", "gpt2", "bert", "mixtral")
TARGETS = {
    "llama": ("q_proj", "k_proj", "o_proj", "down_proj", "lm_head"),
    "llama-tied": ("q_proj", "v_proj", "up_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "bert": ("query", "dense", "classifier"),
    "mixtral": ("q_proj", "o_proj"),
}


class Net(nn.Module):
    """Conv, norm and linears; one linear is reached by two names, one weight is tied."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.body = nn.Sequential(nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, width, bias=False))
        self.shared = nn.Linear(width, width)
        self.again = self.shared
        self.embed = nn.Embedding(9, width)
        self.head = nn.Linear(width, 9, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (n, 3, t) -> (n, 9)."""
        y = self.norm(self.conv(x)).mean(-1)
        return self.head(self.again(self.shared(self.body(y) * self.scale)))


def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny random transformers model, in eval mode.

    Built in `dtype` as from_pretrained does: `.to(dtype)` would cast the rotary frequencies too,
    which no file holds, and then a dense model would not come back exactly either.
    """
    import transformers as tf

    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "num_attention_heads": 4}
    gqa = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
    if kind.startswith("llama"):
        config = tf.LlamaConfig(**size, **gqa, tie_word_embeddings=kind == "llama-tied")
        cls = tf.LlamaForCausalLM
    elif kind == "gpt2":
        config = tf.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        cls = tf.GPT2LMHeadModel
    elif kind == "bert":
        config = tf.BertConfig(**size, intermediate_size=48, num_labels=5)
        cls = tf.BertForSequenceClassification
    else:
        config = tf.MixtralConfig(**size, **gqa, num_local_experts=4, num_experts_per_tok=2)
        cls = tf.MixtralForCausalLM
    return cls._from_config(config, dtype=dtype).eval()


def factor(model: nn.Module, targets: tuple[str, ...], rank: int = RANK) -> nn.Module:
    """Random factors in place of every linear layer with one of these last names."""
    generator = torch.Generator().manual_seed(1)
    done: dict[int, nn.Module] = {}
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if key in targets and layouts.kind(child)
    ]
    for parent, key, dense in places:
        if id(dense) not in done:
            out_features, in_features = layouts.matrix(dense).shape
            down = torch.randn(rank, in_features, generator=generator) * 0.1
            up = torch.randn(out_features, rank, generator=generator) * 0.1
            bias = layouts.bias(dense)
            if bias is not None:
                bias = torch.randn(out_features, generator=generator).to(bias.dtype) * 0.1
            dtype = dense.weight.dtype
            new = LowRankLinear.from_factors(down.to(dtype), up.to(dtype), bias)
            remember_layout(new, layouts.layout(dense))
            done[id(dense)] = new.train(dense.training)
        parent.register_module(key, done[id(dense)])
    return model


def compressed(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny transformers model with factored layers that says so in its config."""
    from lowrank.io import attach

    model = factor(make(kind, dtype), TARGETS[kind])
    assert attach(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    """(2, 7, vocabulary), or (2, classes), for fixed tokens."""
    tokens = torch.arange(14).reshape(2, 7) % 59 + 2
    with torch.no_grad():
        return model(input_ids=tokens.to(next(model.parameters()).device)).logits


def snapshot(model: nn.Module) -> Callable[[], None]:
    """A check that the model is the same, bit for bit: modules, tensors, ties and config."""

    def look() -> tuple[Any, ...]:
        modules = [(n, id(m), m.training) for n, m in model.named_modules(remove_duplicate=False)]
        state = model.state_dict(keep_vars=True)
        held = [(n, id(t), t._version, t.requires_grad) for n, t in state.items()]
        config = getattr(model, "config", None)
        return modules, held, config.to_dict() if config is not None else None

    before, keep = look(), {n: t.clone() for n, t in model.state_dict().items() if not t.is_meta}

    def check() -> None:
        assert look() == before
        after = model.state_dict()
        assert all(torch.equal(after[name], value) for name, value in keep.items())

    return check


@pytest.fixture(scope="session")
def zoo() -> SimpleNamespace:
    return SimpleNamespace(
        Net=Net, make=make, factor=factor, compressed=compressed, logits=logits,
        snapshot=snapshot, targets=TARGETS, rank=RANK,
    )  # fmt: skip


@pytest.fixture
def net() -> nn.Module:
    """The generic network, trained mode off, with three factored layers (one of them shared)."""
    torch.manual_seed(0)
    model = factor(Net(), ("0", "2", "shared", "again"), rank=4)
    model.norm.running_mean.normal_()
    return model.eval()


@pytest.fixture
def folder(net: nn.Module, tmp_path: Path) -> Path:
    """Where the generic network is saved."""
    from lowrank.io import save

    save(net, tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture(scope="session")
def in_new_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Run a function of orders.py in a process of its own: what it found."""
    from lowrank.io import save

    folder = tmp_path_factory.mktemp("processes")
    for kind in ("llama", "mixtral", "gpt2"):
        model = compressed(kind)
        save(model, folder / kind)
        torch.save(logits(model), folder / f"{kind}.pt")
    script = str(Path(__file__).with_name("orders.py"))

    def run(what: str) -> dict[str, Any]:
        env = {
            **os.environ,
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "HF_MODULES_CACHE": str(folder / "modules"),
            "HF_HOME": str(folder / "home"),
            "LOWRANK_AUTOLOAD": "1" if what == "stock" else "0",  # also where it is installed
        }
        done = subprocess.run(
            [sys.executable, script, what, str(folder)],
            env=env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
