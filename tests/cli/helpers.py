"""How the tests call the commands, and the tiny model that they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner, Result

from lowrank.cli import app, inputs

LINES = (
    "Once upon a time there was a tiny model that liked to read.",
    "It read the same four lines again and again, and it was content.",
    "Every word was a friend; every friend was a row of numbers.",
    "Then someone came and took the small singular values away.",
)
PLANTED = "model.layers.1.self_attn.q_proj"  # of rank 3, with equal singular values
HIDDEN, TOKENS = 32, 64  # width; positions that the model knows


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def run(*args: object) -> str:
    """What a command prints; it has to succeed."""
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refused(*args: object) -> str:
    """The one line of a command that has to fail."""
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert result.stderr.startswith("lowrank: ")
    return result.stderr


def cells(output: str, first: str) -> list[str]:
    """The row of a table that starts with this word."""
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [first])


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TOKENS,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 100  # or all words would be equally likely
    basis = torch.linalg.qr(torch.randn(HIDDEN, 3)).Q
    model.get_submodule(PLANTED).weight.data = basis @ basis.T
    return model


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(20)[None] * 7 % 300
    with torch.no_grad():
        return inputs.load_model(str(folder))(input_ids=ids).logits
