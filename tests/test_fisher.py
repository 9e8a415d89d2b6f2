"""Output gradients: the Fisher of the model itself, and a model that is as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.fisher import with_fisher

from . import zoo


def exact_fisher(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """E[g gᵀ] at the output of the first layer, over all labels, by enumeration."""
    hidden = model[0](x).detach().requires_grad_()
    logits = model[2](model[1](hidden))
    chance = logits.detach().softmax(-1)
    total = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64)
    for label in range(logits.shape[1]):
        loss = -logits.log_softmax(-1)[:, label].sum()
        (g,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        total += torch.einsum("t,ti,tj->ij", chance[:, label].double(), g.double(), g.double())
    return total / len(x)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def test_the_mean_over_labels_is_the_fisher() -> None:
    model, x = small(), torch.randn(4000, 6, generator=torch.Generator().manual_seed(1))
    seen = with_fisher(model, lowrank.calibrate(model, x, progress=False))
    found, want = seen.statistics["0"].out_gram, exact_fisher(model, x)
    assert found is not None
    assert float((found - want).norm() / want.norm()) < 0.1  # 4,000 draws
    assert float((found - want).norm()) > 0  # and draws they are


def test_rows_hold_the_squared_gradient_of_the_weight() -> None:
    """One sequence a batch: the weight's gradient itself, from autograd, with the same labels."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(3, 7, 6)
    seen = with_fisher(model, lowrank.calibrate(model, [x], progress=False), seed=5)
    logits = model(x)
    draws = torch.Generator().manual_seed(5)
    labels = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=draws).view(3, 7)
    want = torch.zeros(4, dtype=torch.float64)
    for one, label in zip(logits, labels, strict=True):
        loss = nn.functional.cross_entropy(one, label, reduction="sum")
        (g,) = torch.autograd.grad(loss, model[0].weight, retain_graph=True)
        want += g.double().square().sum(1) / 3
    torch.testing.assert_close(seen.statistics["0"].row_fisher, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("make", [zoo.llama, zoo.gpt2, zoo.opt, zoo.bert])
def test_any_model_and_nothing_is_left_behind(make) -> None:
    torch.manual_seed(0)
    model = make().train()
    frozen = next(model.parameters()).requires_grad_(False)
    ids = torch.randint(0, zoo.VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(2))
    seen = lowrank.calibrate(model, [ids], progress=False)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    again = [with_fisher(model, seen, seed=3).statistics for _ in range(2)]
    assert model.training
    assert not frozen.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters())) - 1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    reached = [name for name, stats in again[0].items() if stats.out_gram is not None]
    assert len(reached) >= 8
    for name in reached:
        gram = again[0][name].out_gram
        assert torch.equal(gram, again[1][name].out_gram)
        assert float(gram.diagonal().sum()) > 0


def test_the_inputs_gram_stays_one_tensor_of_those_who_share_it() -> None:
    model = zoo.llama()
    ids = torch.arange(20)[None]
    seen = with_fisher(model, lowrank.calibrate(model, [ids], progress=False))
    q, k = (seen.statistics[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert q.gram is k.gram
    assert q.out_gram.shape != k.out_gram.shape
    assert with_fisher(model, seen) is seen


def test_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)
    model = zoo.bert().eval()
    ids = torch.randint(1, 60, (3, 8))
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    name = "bert.encoder.layer.1.output.dense"
    found = []
    for batch in (padded, {"input_ids": ids[:, :5], "attention_mask": mask[:, :5]}):
        seen = with_fisher(model, lowrank.calibrate(model, [batch], progress=False), seed=1)
        found.append(seen.statistics[name].out_gram)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_refusals() -> None:
    model, x = small(), torch.randn(8, 6)
    seen = lowrank.calibrate(model, lambda m: m(x), progress=False)
    with pytest.raises(LowrankError, match="need batches, not a callable"):
        with_fisher(model, seen)
    seen = lowrank.calibrate(model, x, progress=False)
    with torch.no_grad():
        model[2].weight.fill_(1e38)
    with pytest.raises((LowrankError, RuntimeError)):
        with_fisher(model, seen)
    assert all(p.grad is None for p in model.parameters())
