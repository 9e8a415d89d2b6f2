"""Recipes that make a claim of their own; those that train are run by hand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lowrank

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


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A recipe that imports its neighbours."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return recipe


def test_a_fixed_mask_of_n_of_m_stays(training: Callable[[str], ModuleType]) -> None:
    """The largest of every eight are trained on, the others are zero after every step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 6))
    dense = model[0].weight.detach().clone()
    training("nm_lm").pruned(model, (1, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(4, 16)) - 1).square().sum().backward()
        optimizer.step()
    weight = model[0].weight.detach().view(6, 2, 8)
    assert torch.equal(weight.count_nonzero(-1), torch.ones(6, 2, dtype=torch.long))
    assert torch.equal(weight.abs().argmax(-1), dense.view(6, 2, 8).abs().argmax(-1))
    assert not torch.isclose(weight, dense.view(6, 2, 8)).any()


def test_a_random_support_has_the_coefficients_of_least_squares(
    training: Callable[[str], ModuleType],
) -> None:
    torch.manual_seed(0)
    weight, layer = torch.randn(7, 12), lowrank.nn.DenseSparseLinear(12, 7, 6, 3)
    before = layer.index.clone()
    training("dsformer_stf").redraw(layer, weight, torch.Generator().manual_seed(1))
    assert layer.fault() == ""
    assert not torch.equal(layer.index, before)
    for row, index, value in zip(weight, layer.index.long(), layer.value, strict=True):
        best = torch.linalg.lstsq(layer.basis.weight[index].T, row[:, None]).solution[:, 0]
        torch.testing.assert_close(value, best, rtol=1e-4, atol=1e-5)


def test_a_rate_is_chosen_by_the_first_seed(training: Callable[[str], ModuleType]) -> None:
    """Seed 0 likes the second rate, seed 1 the first; runs at other rates do not count."""
    losses = {(0.1, 0): 3.0, (0.2, 0): 1.0, (0.1, 1): 0.5, (0.2, 1): 2.0}
    shared = training("python_text")
    runs = shared.over_seeds(
        [0.1, 0.2], 2, lambda lr, seed: {"lr": lr, "seed": seed, "loss": losses[lr, seed]}
    )
    assert [(run["lr"], run["seed"]) for run in runs if run["counts"]] == [(0.2, 0), (0.2, 1)]
    assert len(runs) == 3
    assert shared.counted(runs) == (0.2, 1.5, "1.000 2.000")
