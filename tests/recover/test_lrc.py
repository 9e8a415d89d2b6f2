"""Training of the factors alone: what is frozen stays, and small updates add up."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import lowrank
from lowrank import LowrankError, MasterWeights, lrc_parameters
from tests.zoo import make, mlp, said, tokens, unchanged


def factored(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """The MLPs are factored, attention stays dense."""
    pattern = {"llama": ["gate_proj", "up_proj", "down_proj"], "gpt2": ["c_fc"]}[kind]
    model = make(kind).to(dtype)
    return lowrank.compress(model, 0.5, target_modules=pattern, data=None, progress=False)[0]


def names(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for parameter in parameters]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3, start: int = 0) -> None:
    for step in range(start, start + steps):
        rows = tokens(start=step)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_factors_are_returned_and_all_else_is_frozen() -> None:
    model = factored()
    found = lrc_parameters(model)
    assert names(model, found) == [
        f"model.layers.{i}.mlp.{layer}.{part}.weight"
        for i in range(2)
        for layer in ("gate_proj", "up_proj", "down_proj")
        for part in ("down", "up")
    ]
    assert [p for p in model.parameters() if p.requires_grad] == found


def test_biases_of_factored_layers_are_trained_and_others_not() -> None:
    model = factored("gpt2")
    found = names(model, lrc_parameters(model))
    assert "transformer.h.0.mlp.c_fc.up.bias" in found
    assert all(".c_fc." in name for name in found)


def test_norms_are_trained_where_asked_for() -> None:
    model = factored()
    extra = set(names(model, lrc_parameters(model, norms=True)))
    extra -= set(names(model, lrc_parameters(model)))
    assert extra == {n for n, p in model.named_parameters() if "norm" in n}
    with_bias = factored("gpt2")  # nn.LayerNorm: weight and bias
    found = names(with_bias, lrc_parameters(with_bias, norms=True))
    assert "transformer.h.0.ln_1.bias" in found
    assert "transformer.h.0.attn.c_proj.bias" not in found


def test_what_was_frozen_before_is_trained_if_it_is_a_factor() -> None:
    model = factored().requires_grad_(False)
    assert all(parameter.requires_grad for parameter in lrc_parameters(model))


def test_without_a_factored_layer_it_refuses_and_freezes_nothing() -> None:
    model = mlp(6, 8, 4)
    with unchanged(model), pytest.raises(LowrankError) as caught:
        lrc_parameters(model, norms=True)
    assert said(caught) == "Sequential has no factored layer to train: compress it first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_parameters_are_bit_equal_after_steps(dtype: torch.dtype) -> None:
    model = factored(dtype=dtype).train()
    trained = {id(parameter) for parameter in lrc_parameters(model)}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, MasterWeights(lrc_parameters(model), AdamW, lr=1e-2, weight_decay=0.1))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in trained), name


def test_the_dense_form_of_a_fine_tuned_model_equals_it() -> None:
    model = factored().train()
    train(model, AdamW(lrc_parameters(model), lr=1e-2))
    model.eval()
    want = model(input_ids=tokens()).logits
    dense = lowrank.to_dense(copy.deepcopy(model))
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(dense(input_ids=tokens()).logits, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(factored()(input_ids=tokens()).logits, want, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_below_the_resolution_are_not_lost(dtype: torch.dtype) -> None:
    plain, kept = (nn.Parameter(torch.ones(4, dtype=dtype)) for _ in range(2))
    optimizers = [SGD([plain], lr=1e-4), MasterWeights([kept], SGD, lr=1e-4)]
    for _ in range(1000):
        for parameter, optimizer in zip((plain, kept), optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert (plain == 1).all()
    torch.testing.assert_close(kept.float(), torch.full((4,), 0.9), atol=4e-3, rtol=0)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_it_steps_as_the_optimizer_does_in_float32(kind: type[torch.optim.Optimizer]) -> None:
    """The oracle: the same optimizer on a float32 tensor that is given the same gradients."""
    start = torch.randn(5, 3).bfloat16()
    parameter, oracle = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours, theirs = MasterWeights([parameter], kind, lr=0.03), kind([oracle], lr=0.03)
    for step in range(20):
        gradient = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).bfloat16()
        parameter.grad, oracle.grad = gradient, gradient.float()
        ours.step()
        theirs.step()
        assert torch.equal(parameter, oracle.bfloat16())


def test_wide_parameters_need_no_copy() -> None:
    wide, narrow = nn.Parameter(torch.ones(3).double()), nn.Parameter(torch.ones(3).bfloat16())
    optimizer = MasterWeights([wide, narrow], SGD, lr=0.5)
    for parameter in (wide, narrow):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert wide.tolist() == narrow.tolist() == [0.5] * 3
    assert [copy is None for copy in optimizer.state_dict()["masters"]] == [True, False]


def test_a_scheduler_sets_the_rate() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterWeights([parameter], SGD, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for want in (-1.0, -1.5, -1.75):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
        assert parameter.tolist() == [want]


def test_groups_keep_their_options_and_can_be_added() -> None:
    one, two, three = (nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)) for _ in range(3))
    optimizer = MasterWeights([{"params": [one], "lr": 2.0}, {"params": two}], SGD, lr=1.0)
    optimizer.add_param_group({"params": three, "lr": 4.0})
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 1.0, 4.0]
    for group, parameter in zip(optimizer.param_groups, (one, two, three), strict=True):
        assert group["params"][0] is parameter
    for parameter in (one, two, three):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [parameter.item() for parameter in (one, two, three)] == [-2.0, -1.0, -4.0]
    optimizer.zero_grad()
    assert one.grad is None


def test_a_closure_is_run_with_gradients() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterWeights([parameter], SGD, lr=0.25)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert parameter.tolist() == [0.5, 0.5]


def test_a_parameter_without_a_gradient_stays() -> None:
    one, two = (nn.Parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = MasterWeights([one, two], AdamW, lr=0.25, weight_decay=0.5)
    one.grad = torch.ones_like(one)
    optimizer.step()
    assert two.tolist() == [1]
    assert one.tolist() != [1]


def test_a_run_that_is_interrupted_goes_on_as_if_it_had_not_been() -> None:
    through = factored(dtype=torch.bfloat16).train()
    optimizer = MasterWeights(lrc_parameters(through), AdamW, lr=1e-3)
    train(through, optimizer)
    stopped, state = copy.deepcopy(through), copy.deepcopy(optimizer.state_dict())
    train(through, optimizer, start=3)
    again = MasterWeights(lrc_parameters(stopped), AdamW, lr=0.5)  # the stored rate wins
    again.load_state_dict(state)
    train(stopped, again, start=3)
    for one, two in zip(through.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_state_of_other_parameters_is_refused() -> None:
    one, two = nn.Parameter(torch.ones(2).bfloat16()), nn.Parameter(torch.ones(3).bfloat16())
    state = MasterWeights([one], SGD, lr=1.0).state_dict()
    optimizer = MasterWeights([two], SGD, lr=1.0)
    with pytest.raises(LowrankError, match=r"shapes \[\(2,\)\], expected \[\(3,\)\]"):
        optimizer.load_state_dict(state)
    with pytest.raises(LowrankError, match="or by another optimizer"):
        optimizer.load_state_dict(SGD([two], lr=1.0).state_dict())


def test_a_parameter_changed_from_outside_is_taken_as_it_is() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterWeights([parameter], SGD, lr=0.25)
    with torch.no_grad():
        parameter[0] = 8
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.tolist() == [7.75, 0.75]
