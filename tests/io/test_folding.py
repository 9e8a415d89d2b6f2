"""Adapters beside merged layers go back into factors, exactly."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank
from lowrank import LowrankError
from lowrank.nn import LowRankLinear
from tests.zoo import make, tokens, unchanged

peft = pytest.importorskip("peft")
IDS = tokens(2, 6)
NEAR = {"atol": 1e-5, "rtol": 1e-5}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@functools.cache
def _factored(kind: str, **options: Any) -> Any:
    given = {"data": [tokens(16, 32)], "progress": False, **options}
    return lowrank.compress(make(kind), 0.6, **given)[0]


def factored(kind: str = "llama", **options: Any) -> Any:
    return copy.deepcopy(_factored(kind, **options))


def started(model: Any, kind: str = "llama", rank: Any = 3) -> Any:
    """A live model beside the factored one, its adapters trained a little."""
    live = lowrank.residual_adapters(model, make(kind), rank, copy=True).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return live


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("llama", {"method": "lowrank-sparse"}),
        ("llama", {"method": "lowrank-masked", "target_modules": ("k_proj", "up_proj")}),
        ("llama", {"exclude_modules": ("q_proj",)}),
    ],
)
def test_the_sum_of_ranks_is_exact(kind: str, options: dict[str, Any], tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = factored(kind, **options)
    ranks = {n: m.rank for n, m in model.named_modules() if hasattr(m, "rank")}
    live = started(model, kind)
    assert not torch.allclose(logits(model), logits(live), atol=1e-3)
    wide = lowrank.fold_adapters(live, model)
    assert wide is model
    torch.testing.assert_close(logits(wide), logits(live), **NEAR)
    assert {n: m.rank - 3 for n, m in wide.named_modules() if hasattr(m, "rank")} == ranks
    wide.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(wide))
    torch.testing.assert_close(logits(live.merge_and_unload()), logits(wide), **NEAR)


def test_adapters_on_zeros_become_the_layers() -> None:
    model = factored("gpt2")
    rank = max(m.rank for m in model.modules() if isinstance(m, LowRankLinear))
    live = lowrank.residual_adapters(model, rank=rank, quantize=torch.zeros_like, copy=True)
    again = lowrank.fold_adapters(live)
    assert sum(isinstance(m, LowRankLinear) for m in again.modules()) == 8
    torch.testing.assert_close(logits(again.eval()), logits(model), **NEAR)
    dense = lowrank.to_dense(again)  # of the class that it had
    assert type(dense.transformer.h[0].mlp.c_fc) is type(make("gpt2").transformer.h[0].mlp.c_fc)


def test_trained_biases_come_along() -> None:
    config = peft.LoraConfig(r=2, target_modules=["c_fc"], bias="lora_only")
    model = factored("gpt2")
    live = started(model, "gpt2", config)
    with torch.no_grad():
        live.get_base_model().transformer.h[0].mlp.c_fc.base_layer.bias.add_(0.5)
    want = logits(live)
    torch.testing.assert_close(logits(lowrank.fold_adapters(live, model)), want, **NEAR)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": "pivoted"}, "is a PivotedLinear and cannot be widened: merge with peft"),
        ({"method": "basis-sharing"}, "LowRankLinear, whose basis others read, and cannot be"),
    ],
)
def test_forms_that_cannot_be_widened(options: dict[str, Any], message: str) -> None:
    model = factored(**options)
    live = started(model)
    with unchanged(model), unchanged(live), pytest.raises(LowrankError, match=message):
        lowrank.fold_adapters(live, model)


def test_a_base_that_is_another_is_refused() -> None:
    model = factored()
    live = started(model)
    with pytest.raises(LowrankError, match=r"base of .* is not zero: give the factored model"):
        lowrank.fold_adapters(live)
    with torch.no_grad():
        live.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.mul_(1.001)
    with unchanged(model), pytest.raises(LowrankError, match=r"base of model.layers.1.mlp.up_proj"):
        lowrank.fold_adapters(live, model)


@pytest.mark.parametrize("state", ["merged", "disabled", "dora", "copies", "none"])
def test_what_is_more_than_plain_lora_is_refused(state: str) -> None:
    options = {"dora": {"use_dora": True}, "copies": {"modules_to_save": ["lm_head"]}}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options.get(state, {}))
    live = peft.get_peft_model(make("llama"), config)
    if state == "merged":
        live.merge_adapter()
    if state == "disabled":
        live.base_model.disable_adapter_layers()
    given = make("llama") if state == "none" else live
    with pytest.raises(LowrankError, match=r"plain, active LoRA|expected a peft model"):
        lowrank.fold_adapters(given, make("llama"))
