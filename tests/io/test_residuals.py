"""Adapters that start from residuals: what numpy's SVD says, and what peft does with them."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.io.residuals import adapter_layers, weight_of
from tests.zoo import calibration, make, tokens, unchanged

peft = pytest.importorskip("peft")
IDS = tokens(2, 6)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@functools.cache
def _small(kind: str) -> Any:
    return lowrank.compress(make(kind), 0.5, data=None, progress=False)[0]


def small(kind: str = "llama") -> Any:
    return copy.deepcopy(_small(kind))


def coarse(weight: Tensor) -> Tensor:
    """The weight on a grid of 15 steps a row."""
    step = weight.abs().amax(1, keepdim=True) / 7
    return (weight / step).round() * step


def parts(live: Any, dense: Any) -> dict[str, tuple[Any, Any, Any]]:
    """W, the base and s B A of every layer, as float64 arrays of numpy."""
    found = {}
    for name, layer in adapter_layers(live.get_base_model()).items():
        low = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        wanted, base = weight_of(dense.get_submodule(name)), weight_of(layer.base_layer)
        low = low * layer.scaling["default"]
        found[name] = tuple(t.detach().numpy() for t in (wanted, base, low))
    return found


def cut(matrix: Any, rank: int) -> Any:
    """numpy's best approximation of that rank."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_start_is_the_svd_of_the_residual(kind: str) -> None:
    dense, live = make(kind), lowrank.residual_adapters(small(kind), make(kind), 4)
    layers = parts(live, dense)
    assert len(layers) == {"llama": 14, "gpt2": 8}[kind]
    for wanted, base, low in layers.values():
        np.testing.assert_allclose(low, cut(wanted - base, 4), atol=2e-6)
        assert np.linalg.norm(wanted - base - low) < 0.95 * np.linalg.norm(wanted - base)
    before, after = ((logits(model) - logits(dense)).norm() for model in (small(kind), live.eval()))
    assert after < before


def test_at_full_rank_the_model_is_the_dense_one() -> None:
    live = lowrank.residual_adapters(small(), make("llama"), 40).eval()
    torch.testing.assert_close(logits(live), logits(make("llama")), atol=2e-6, rtol=1e-5)
    for layer in adapter_layers(live.get_base_model()).values():
        rank = min(layer.in_features, layer.out_features)
        surplus = layer.lora_A["default"].weight[rank:], layer.lora_B["default"].weight[:, rank:]
        assert surplus[0].abs().amin(1).gt(0).all() or not len(surplus[0])  # gradients reach B
        assert not surplus[1].any()


def test_with_statistics_the_outputs_count() -> None:
    dense = make("llama")
    stats = calibration(dense, [tokens(16, 32)])
    live = lowrank.residual_adapters(small(), dense, 4, calibration=stats)
    for name, (wanted, base, low) in parts(live, dense).items():
        gram = stats.statistics[name].gram.numpy()
        values, vectors = np.linalg.eigh(gram)
        root = vectors * np.sqrt(values.clip(0))
        rest = wanted - base
        optimum = np.linalg.norm(rest @ root - cut(rest @ root, 4))
        assert np.linalg.norm((rest - low) @ root) == pytest.approx(optimum, rel=1e-4)
        assert np.linalg.norm(rest - low) <= np.linalg.norm(rest)


def test_the_base_is_quantised_as_loftq_does() -> None:
    dense = make("llama")
    errors = []
    for iterations in (1, 5):
        live = lowrank.residual_adapters(small(), dense, 4, quantize=coarse, iterations=iterations)
        layers = parts(live, dense).values()
        errors.append([np.linalg.norm(wanted - base - low) for wanted, base, low in layers])
        if iterations == 1:
            for wanted, base, low in layers:
                np.testing.assert_allclose(base, coarse(torch.tensor(wanted)).numpy(), atol=1e-6)
                np.testing.assert_allclose(low, cut(wanted - base, 4), atol=2e-6)
    once, often = np.array(errors)
    assert (often <= once).all()
    assert often.sum() < 0.97 * once.sum()


def test_the_best_iteration_is_kept() -> None:
    calls = 0

    def worse(weight: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return coarse(weight) if calls % 2 else torch.zeros_like(weight)

    dense = make("llama")
    live = lowrank.residual_adapters(dense, rank=4, quantize=worse, iterations=2, copy=True)
    assert calls == 2 * 14
    for wanted, base, _ in parts(live, dense).values():
        np.testing.assert_allclose(base, coarse(torch.tensor(wanted)).numpy(), atol=1e-6)


def test_a_base_of_zeros_leaves_all_to_the_adapters() -> None:
    model = small()
    layers = [m for m in model.modules() if isinstance(m, lowrank.nn.LowRankLinear)]
    rank = max(layer.rank for layer in layers)
    live = lowrank.residual_adapters(model, rank=rank, quantize=torch.zeros_like, copy=True)
    assert not any(base.any() for _, base, _ in parts(live, lowrank.to_dense(small())).values())
    torch.testing.assert_close(logits(live.eval()), logits(model), atol=1e-5, rtol=1e-5)


def test_peft_alone_saves_loads_and_merges(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    options = {"quantize": coarse, "folder": tmp_path / "base"}
    live = lowrank.residual_adapters(small("gpt2"), make("gpt2"), 4, **options).eval()
    live.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert "quantization_config" not in config
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(live), atol=1e-6, rtol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with live.disable_adapter():
        assert torch.equal(logits(base), logits(live))
    merged = live.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(again), atol=1e-5, rtol=1e-5)


def test_a_config_of_ones_own() -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=16, use_rslora=True, target_modules=["q_proj"], rank_pattern={"1.*": 6}
    )
    dense = make("llama")
    live = lowrank.residual_adapters(small(), dense, config)
    layers = parts(live, dense)
    assert len(layers) == 2
    for name, (wanted, base, low) in layers.items():
        rank = 6 if ".1." in name else 4
        np.testing.assert_allclose(low, cut(wanted - base, rank), atol=2e-6)
    assert config.target_modules == {"q_proj"}  # the user's is left alone


def test_layers_that_are_quantised_already_are_read_as_they_act() -> None:
    class Codes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, coarse(self.weight), self.bias)

    dense = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))
    model = copy.deepcopy(dense)
    for layer in (model[0], model[2]):
        layer.__class__ = Codes
    live = lowrank.residual_adapters(
        model, dense, peft.LoraConfig(r=20, target_modules=["0", "2"], lora_alpha=20)
    )
    x = torch.randn(5, 12)
    torch.testing.assert_close(live(x), dense(x))


def bad(**options: Any) -> Any:
    return peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], **options})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing is missing": ({"dense": None}, r"no residual: give the dense model, or quantize="),
    "another model": ({"dense": make("gpt2")}, "GPT2LMHeadModel has no module 'model"),
    "rank": ({"rank": 0}, r"positive integer or a peft\.LoraConfig, got 0"),
    "start": ({"rank": bad(init_lora_weights="pissa")}, "leave init_lora_weights=True"),
    "norms": ({"rank": bad(use_dora=True)}, "use_dora=False, got True and True"),
    "table": ({"rank": bad(target_modules=["embed_tokens"])}, "embed_tokens is a Embedding: resi"),
    "iterations": ({"iterations": 2}, "1 without quantize=, got 2"),
    "not finite": ({"quantize": lambda w: w / 0}, "q_proj: quantize= returned .* not finite"),
    "quantised": ({"quantize": lambda w: w[:2]}, r"must return a tensor \(32, 32\).*got \(2, 32\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(case: str) -> None:
    given, message = REFUSED[case]
    model = small()
    with unchanged(model), pytest.raises(LowrankError, match=message):
        lowrank.residual_adapters(model, **{"dense": make("llama"), **given})


def test_other_shapes_and_live_adapters_are_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(6, 4))
    config = peft.LoraConfig(r=2, target_modules=["1"])
    with pytest.raises(LowrankError, match=r"1 has the shape \(4, 6\) in the dense model, \(4, 8"):
        lowrank.residual_adapters(net, other, config)
    live = peft.get_peft_model(make("llama"), bad())
    with pytest.raises(LowrankError, match="merge first"):
        lowrank.residual_adapters(live, make("llama"))
    layer = nn.Sequential(nn.Linear(8, 8))
    one = lowrank.compress(layer, 0.5, data=None, progress=False)[0][0]
    with pytest.raises(LowrankError, match="itself one layer"):
        lowrank.residual_adapters(one, layer[0])
