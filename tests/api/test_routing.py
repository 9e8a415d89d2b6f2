"""MLPs in experts, through the verb: exact with all, files, a way back, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, route_mlps
from lowrank.io.verifying import verify
from lowrank.nn import RoutedMLP

from ..zoo import bert, make, mlp, refusal, tokens, unchanged

DATA = [tokens(4, 12), tokens(4, 12, start=5)]


def routed(kind: str = "llama", **options: Any) -> tuple[Any, Any]:
    return route_mlps(make(kind), 4, 2, data=DATA, progress=False, **options)


def all_on(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, RoutedMLP):
            module.active = module.experts
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    found: Tensor = model(DATA[0] if ids is None else ids).logits
    return found


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return routed()


def test_with_all_experts_the_model_is_the_dense_one(small: Any) -> None:
    dense = make("llama")
    model, routing = copy.deepcopy(small)
    away = float((logits(model) - logits(dense)).abs().max())
    assert away > 1e-3
    torch.testing.assert_close(logits(all_on(model)), logits(dense), rtol=0, atol=1e-5)
    assert not torch.equal(model.model.layers[0].mlp.gate_proj.weight,
                           dense.model.layers[0].mlp.gate_proj.weight)  # fmt: skip
    assert [layer.name for layer in routing.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_the_report_counts_stored_and_active_apart(small: Any) -> None:
    model, routing = small
    weights, routers, scales = 2 * 3 * 48 * 32, 2 * 4 * 32, 2 * 4
    assert routing.dense == weights
    assert routing.stored == weights + routers + scales
    assert routing.products == weights // 2 + routers
    assert f"stored {routing.stored:,} (dense {weights:,}: none are saved)" in str(routing)
    assert all(0 < layer.least <= layer.missed < 1 for layer in routing.layers)
    assert sum(p.numel() for p in model.parameters()) == (
        sum(p.numel() for p in make("llama").parameters()) + routers + scales + 2 * 4
    )


def test_a_saved_model_is_loaded_bit_for_bit_and_reads_as_a_dense_one(
    small: Any, tmp_path: Path
) -> None:
    model = small[0]
    model.save_pretrained(tmp_path)
    again = lowrank.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert verify(tmp_path).modules == 2
    dense = make("llama")
    left = dense.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    added = ("mlp.router.weight", "mlp.router.bias", "mlp.scale")
    assert all(name.endswith(added) for name in left.unexpected_keys)
    assert set(left.missing_keys) <= {"lm_head.weight"}
    torch.testing.assert_close(logits(dense), logits(make("llama")), rtol=0, atol=1e-5)


def test_merging_wants_all_experts_and_gives_the_modules_back(small: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(small[0])
    with pytest.raises(LowrankError, match=r"layers.0.mlp cannot be merged: it runs 2 of 4"):
        lowrank.to_dense(model)
    model.save_pretrained(tmp_path)
    again = lowrank.to_dense(all_on(lowrank.from_pretrained(tmp_path)))
    kinds = [type(module) for module in make("llama").modules()]
    assert [type(module) for module in again.modules()] == kinds
    assert getattr(again.config, "quantization_config", None) is None
    torch.testing.assert_close(logits(again), logits(make("llama")), rtol=0, atol=1e-5)


def test_a_plain_module_is_saved_and_loaded(tmp_path: Path) -> None:
    net = nn.Sequential(mlp(8, 12, 6), nn.Tanh(), mlp(6, 24, 3))
    x = torch.randn(30, 8)
    want = net(x).detach()
    model, _ = route_mlps(net, 3, 1, data=[x], copy=True, progress=False)
    assert [type(part) for part in model] == [RoutedMLP, nn.Tanh, RoutedMLP]
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, copy.deepcopy(net))
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(all_on(again)(x), want, rtol=0, atol=1e-5)
    spec = json.loads((tmp_path / "lowrank.json").read_text())["modules"]["0"]
    assert (spec["layers"], spec["activation"], spec["biases"]) == ("0 2", "relu", "0 2")
    with pytest.raises(LowrankError, match=r"0\.0: stored as \(out, in, bias\)"):
        lowrank.load(tmp_path, nn.Sequential(mlp(8, 15, 6), nn.Tanh(), mlp(6, 24, 3)))
    root, _ = route_mlps(mlp(8, 12, 6), 3, 1, data=[x], progress=False)
    assert isinstance(root, RoutedMLP)


def test_other_models_other_groups_and_copies() -> None:
    t5 = make("t5")
    batch = {"input_ids": tokens(), "labels": tokens(2, 5)}
    with unchanged(t5):
        model, routing = route_mlps(t5, 4, 2, data=[batch], copy=True, progress=False)
    assert len(routing.layers) == 4
    with torch.no_grad():
        want = t5(**batch).logits
        torch.testing.assert_close(all_on(model)(**batch).logits, want, rtol=0, atol=1e-5)
    for groups in ("random", "contiguous"):
        one, other = (routed(groups=groups, seed=3)[0] for _ in range(2))
        assert torch.equal(logits(one), logits(other))
        torch.testing.assert_close(logits(all_on(one)), logits(make("llama")), rtol=0, atol=1e-5)


def test_distillation_lowers_the_divergence() -> None:
    dense = make("llama")
    model, routing = routed(distill_steps=8)
    assert routing.trained.after < routing.trained.before
    assert lowrank.kl(model, dense, DATA) < lowrank.kl(routed()[0], dense, DATA)
    assert "distilled 8 steps" in str(routing)


def test_a_compressed_model_goes_on_to_be_routed() -> None:
    model, _ = lowrank.compress(
        make("llama"), 0.6, method="svd", target_modules=["q_proj", "o_proj"], progress=False
    )
    model, routing = route_mlps(model, 4, 2, data=DATA, progress=False)
    assert len(routing.layers) == 2
    assert model.config.quantization_config.modules.keys() >= {
        "model.layers.0.self_attn.q_proj", "model.layers.1.mlp",
    }  # fmt: skip
    assert (
        lowrank.inspect(model, progress=False)["model.layers.1.mlp"].params
        == 3 * 48 * 32 + 4 * 32 + 4
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": 5}, r"experts=5 does not divide the neurons of model.layers.0.mlp \(48\)"),
        ({"active": 9}, r"active must be in \[1, 8\] \(experts\), got 9"),
        ({"groups": "coactiv"}, "did you mean 'coactive'"),
        ({"data": lambda m: m(DATA[0]), "distill_steps": 2}, "pass them as data"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(options: Any, said: str) -> None:
    model = make("llama")
    given = {"data": DATA, **options}
    with pytest.raises(LowrankError, match=said):
        refuse(model, given)


def refuse(model: nn.Module, given: dict[str, Any]) -> None:
    with unchanged(model):
        route_mlps(model, progress=False, **given)


def test_a_model_without_mlps_is_told_so() -> None:
    assert "there is no MLP to route" in refusal(
        lambda: route_mlps(net, 4, 2, data=DATA, progress=False), net := bert().eval()
    )
