"""From plan to model: what is put in place, and which plans fit which models."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, Plan
from lowrank.nn import LowRankLinear
from tests.zoo import calibration, make, mlp, numbers, said, tokens, unchanged, weights

X = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))


def test_the_model_itself_is_changed_and_returned() -> None:
    model = mlp(24, 40, 16)
    got, _ = lowrank.compress(model, 0.5, target_modules="all")
    assert got is model
    assert all(isinstance(model[i], LowRankLinear) for i in (0, 2))


def test_a_root_layer_is_returned_anew() -> None:
    layer = nn.Linear(24, 16)
    with unchanged(layer):
        got, report = lowrank.compress(layer, 0.5)
    assert isinstance(got, LowRankLinear)
    assert report.sites[0].name == ""
    assert "(root)" in str(report)
    assert report.params_after == sum(p.numel() for p in got.parameters()) < report.params_before


@pytest.mark.parametrize("verb", ["compress", "apply", "plan as ratio"])
def test_a_copy_leaves_the_original_bit_for_bit(verb: str) -> None:
    model = make("llama").train()
    plan = lowrank.plan(model, 0.6, data=None)
    with unchanged(model):
        if verb == "apply":
            got, report = lowrank.apply(model, plan, data=None, copy=True)
        else:
            ratio = plan if "plan" in verb else 0.6
            got, report = lowrank.compress(model, ratio, data=None, copy=True)
    assert got is not model
    assert report.params_after < report.params_before == sum(p.numel() for p in model.parameters())
    assert got.config.quantization_config.quant_method == "lowrank"
    again, _ = lowrank.compress(model, 0.6, data=None)
    for one, other in zip(got.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_biases_and_flags_are_kept(dtype: torch.dtype) -> None:
    model = make("gpt2").to(dtype).train()
    at = "transformer.h.0.mlp.c_fc"
    bias = torch.randn(128).to(dtype)
    with torch.no_grad():
        model.get_submodule(at).bias.copy_(bias)
    model.get_submodule(at).weight.requires_grad_(False)
    model, _ = lowrank.compress(model, 0.6, data=tokens(), progress=False)
    new = model.get_submodule(at)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(new.bias, bias)
    assert new.training
    assert [p.requires_grad for p in new.parameters()] == [False, False, True]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model(input_ids=tokens()).logits.dtype == dtype


def test_the_fast_path_of_torchs_encoder_still_works() -> None:
    """In eval mode it reads linear1.weight and never calls linear1, if attention is torch's."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model, report = lowrank.compress(model, 0.5, target_modules=["linear1", "linear2"])
    assert sum(not site.reason for site in report.sites) == 4
    x = torch.randn(2, 5, 16)
    slow = model(x)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_results_are_the_same_twice() -> None:
    got = []
    for run in range(2):
        model = make("llama")
        with torch.random.fork_rng():
            torch.manual_seed(run)  # the global state is not what decides
            model, report = lowrank.compress(model, 0.6, data=tokens(4, 16), progress=False)
        got.append((model.state_dict(), report))
    (one, first), (other, second) = got
    assert first.plan == second.plan
    assert [s.measured for s in first.sites] == [s.measured for s in second.sites]
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_seed_decides_what_is_random() -> None:
    dense = mlp(24, 16)
    first, same, other = (
        lowrank.compress(dense, 0.5, method="random", seed=seed, copy=True)[0][0].down.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# Plans


def test_plan_then_apply_is_compress() -> None:
    data = tokens(4, 16)
    one, report = lowrank.compress(make("llama"), 0.6, data=data, progress=False)
    model = make("llama")
    found = calibration(model, data)
    plan = Plan.from_json(lowrank.plan(model, 0.6, data=found).to_json())
    other, again = lowrank.apply(model, plan, data=found)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert report.plan == again.plan == plan
    assert [s.measured for s in report.sites] == [s.measured for s in again.sites]
    third, _ = lowrank.compress(make("llama"), plan, data=found)
    assert torch.equal(third.model.layers[0].mlp.up_proj.up.weight,
                       one.model.layers[0].mlp.up_proj.up.weight)  # fmt: skip


def test_a_plan_edited_in_its_text_applies() -> None:
    model = mlp(24, 40, 16)
    text = lowrank.plan(model, 0.5, target_modules="all").to_json()
    body = json.loads(text)
    body["entries"][0]["size"] = [3]
    model, report = lowrank.apply(model, Plan.from_json(json.dumps(body)))
    assert model[0].rank == 3
    assert report.achieved == pytest.approx(report.plan.kept())
    assert report.achieved == numbers(model) / (24 * 40 + 40 * 16)


def test_a_plan_for_another_model() -> None:
    plan = lowrank.plan(mlp(24, 40, 16), 0.5)
    cases = {
        "it names 2, the model has 0": mlp(24, 40),
        "has no entry for 4: it was made for another model": mlp(24, 40, 16, 8),
        "shape (40, 24) under the names 0; here it is (41, 24) under 0": mlp(24, 41, 16),
        "the model has no linear layer": nn.ReLU(),
    }
    for words, model in cases.items():
        with unchanged(model), pytest.raises(LowrankError) as caught:
            lowrank.apply(model, plan)
        assert words in said(caught)


def test_a_plan_for_another_sharing() -> None:
    layer = nn.Linear(16, 16)
    shared = nn.ModuleDict({"a": layer, "b": layer})
    apart = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    with pytest.raises(LowrankError, match=r"under the names a, b; here .* under a$"):
        lowrank.apply(apart, lowrank.plan(shared, 0.5))
    with pytest.raises(LowrankError, match=r"under the names a; here .* under a, b$"):
        lowrank.apply(shared, lowrank.plan(apart, 0.5))


def test_a_plan_that_was_applied_before() -> None:
    model = mlp(24, 40, 16)
    plan = lowrank.plan(model, 0.5)
    lowrank.apply(model, plan)
    with unchanged(model), pytest.raises(LowrankError, match="0 is factored already") as caught:
        lowrank.apply(model, plan)
    said(caught)


def test_a_plan_for_a_layer_that_cannot_be_factored_now() -> None:
    model = mlp(24, 40, 16)
    plan = lowrank.plan(model, 0.5, target_modules="all")
    handle = model[2].register_forward_hook(lambda *_: None)
    with unchanged(model), pytest.raises(LowrankError, match="2 cannot be factored: it has hooks"):
        lowrank.apply(model, plan)
    handle.remove()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with unchanged(model), pytest.raises(LowrankError, match="2: the weight holds NaN or Inf"):
        lowrank.apply(model, plan)


def test_a_plan_that_needs_data_says_so() -> None:
    model = mlp(24, 40, 16)
    plan = lowrank.plan(model, 0.5, data=X, progress=False)
    with unchanged(model), pytest.raises(LowrankError) as caught:
        lowrank.apply(model, plan)
    assert said(caught) == (
        "0: whitened works from calibration data (gram): pass data=… that reaches this layer"
    )


def test_what_is_no_plan() -> None:
    with pytest.raises(LowrankError, match=r"apply carries out a Plan, got 0.5; compress takes"):
        lowrank.apply(mlp(24, 16), 0.5)  # type: ignore[arg-type]


def test_a_plan_is_checked_before_the_model_is_run() -> None:
    def run(model: nn.Module) -> None:
        raise AssertionError("the model was run")

    with pytest.raises(LowrankError, match="another model"):
        lowrank.apply(mlp(24, 16), lowrank.plan(mlp(24, 40, 16), 0.5), data=run)


def test_no_more_than_the_factors_and_numpy_agree() -> None:
    """The layer is the best of its rank: Eckart and Young, by numpy."""
    model = mlp(24, 40)
    weight = weights(model)["0"].double().numpy()
    model, _ = lowrank.compress(model, rank=5)
    u, s, vt = np.linalg.svd(weight)
    best = (u[:, :5] * s[:5]) @ vt[:5]
    np.testing.assert_allclose(model[0].dense_weight().detach().numpy(), best, atol=1e-5)
