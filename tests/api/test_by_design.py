"""Factorisation by design: uniform shares, two starts, in place or a copy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import lowrank
from lowrank import LowrankError, factorize_by_design
from lowrank.nn import LowRankLinear
from tests.zoo import mlp, unchanged


@pytest.mark.parametrize("init", ["spectral", "random"])
def test_every_layer_keeps_the_share_and_its_bias(init: str) -> None:
    model = mlp(48, 64, 32, 7)  # the last is its head
    biases = [model[i].bias.detach().clone() for i in (0, 2)]
    small, report = factorize_by_design(model, 0.5, init)  # type: ignore[arg-type]
    assert small is model
    assert report.plan.settings["policy"] == "uniform"
    assert 0.45 < report.achieved <= 0.5
    for layer, bias in zip((small[0], small[2]), biases, strict=True):
        assert isinstance(layer, LowRankLinear)
        assert torch.equal(layer.bias, bias)


def test_spectral_is_the_nearest_product_to_the_initial_weight() -> None:
    model = mlp(48, 64)
    weight = model[0].weight.detach().double().numpy()
    small, _ = factorize_by_design(model, 0.5)
    rank = small[0].rank
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    want = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose(small[0].dense_weight().detach().numpy(), want, atol=1e-6)


def test_random_is_fresh_has_the_scale_of_the_weights_and_follows_the_seed() -> None:
    model = mlp(96, 128)
    weight = model[0].weight.detach()
    found = [
        factorize_by_design(model, 0.5, "random", seed=seed, copy=True)[0][0].dense_weight()
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    cosine = torch.nn.functional.cosine_similarity(found[0].flatten(), weight.flatten(), dim=0)
    assert abs(float(cosine.detach())) < 0.1
    assert float(found[0].detach().std()) == pytest.approx(float(weight.std()), rel=0.15)


def test_a_copy_leaves_the_model() -> None:
    model = mlp(48, 64, 32)
    with unchanged(model):
        small, _ = factorize_by_design(model, 0.5, copy=True)
    assert small is not model


def test_it_refuses_as_compress_does() -> None:
    model = mlp(48, 64, 32)
    for bad in (1.5, 0, "half"):
        with unchanged(model), pytest.raises(LowrankError, match="ratio is the fraction kept"):
            factorize_by_design(model, bad)  # type: ignore[arg-type]
    with unchanged(model), pytest.raises(LowrankError, match="init='random' starts low-rank"):
        factorize_by_design(model, 0.5, "random", method="snmf")
    with unchanged(model), pytest.raises(LowrankError, match="unknown init"):
        factorize_by_design(model, 0.5, "svd")  # type: ignore[arg-type]


def test_a_model_factored_by_design_learns_and_is_saved(tmp_path: object) -> None:
    torch.manual_seed(0)
    model, _ = factorize_by_design(mlp(16, 32, 16), 0.5)
    skeleton = copy.deepcopy(mlp(16, 32, 16))
    x, optimizer = torch.randn(64, 16), torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x) - x.flip(1)).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    lowrank.save(model, tmp_path)  # type: ignore[arg-type]
    again = lowrank.load(tmp_path, skeleton)  # type: ignore[arg-type]
    torch.testing.assert_close(again(x), model(x))
