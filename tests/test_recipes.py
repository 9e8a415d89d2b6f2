"""Recipes that make a claim of their own; those that train are run by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_llama() -> Any:
    """Grouped queries, biases and a wide MLP: all shapes, wide, tall and square."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide them
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("ratio", [0.8, 0.29])
def test_whitened_by_hand_is_what_the_library_gives(ratio: float) -> None:
    """Hooks, torch.linalg.svd and two nn.Linear against `compress`, to 1e-6 in every layer."""
    ids = torch.randint(64, (7, 16), generator=torch.Generator().manual_seed(1))
    model = random_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows, logits, dense = recipe("whitened_by_hand").compare(
        model, ids[:5].split(3), ids[5:], ratio
    )
    assert len(rows) == 2 * 7
    assert max(row.difference for row in rows) < 1e-6
    assert logits < 1e-6
    # every layer lost something, and the logits moved: two dense models would be equal too
    assert min(row.lost for row in rows) > 1e-4
    assert dense > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_whitened_by_hand_runs_as_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["whitened_by_hand.py", "--rows", "4", "--ratio", "0.5"])
    recipe("whitened_by_hand").main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["layer", "rank", "lost", "difference"]
    assert len(printed) == 1 + 5 * 7 + 1
    assert printed[1].startswith("model.layers.0.self_attn.q_proj")
    assert printed[-1].startswith("largest difference of a layer ")
