"""STF: gradients on what is not chosen, exactly s coefficients a row, and the life of a latent."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.linalg import pursuit
from lowrank.nn import DenseSparseLinear
from lowrank.train import STF
from lowrank.train.parts.latent import LatentCoefficients, LatentWeight
from lowrank.train.parts.optimizer import check_same_parameters
from tests.draws import normal
from tests.nn.forms import check_differences
from tests.train.loops import Net, fit, of_outputs, one_layer, run, sgd

LATENTS = pytest.mark.parametrize("latent", ["coefficients", "weight"])


def mean_of_outputs(model: Any, target: Tensor) -> Tensor:
    return 2 * of_outputs(model, target) / target.numel()


def coefficients() -> LatentCoefficients:
    """r = 6, s = 2, (7, 5)."""
    return LatentCoefficients(
        nn.Parameter(normal(6, 5)), normal(7, 6, seed=1), 2, nn.Parameter(normal(7, seed=2))
    )


def through_weight() -> LatentWeight:
    basis, weight = nn.Parameter(normal(6, 5)), nn.Parameter(normal(7, 5, seed=1))
    code = pursuit(weight.detach() @ basis.detach().T, basis.detach() @ basis.detach().T, 2)
    return LatentWeight(basis, weight, code, nn.Parameter(normal(7, seed=2)))


def test_forward_takes_the_s_largest_of_every_row() -> None:
    """NumPy's word: what counts is |z| times the length of the atom."""
    layer = coefficients()
    z, basis = layer.latent.detach().numpy(), layer.basis.weight.detach().numpy()
    weight, others = np.zeros((7, 5)), 0
    for row in range(7):
        best = np.argsort(-np.abs(z[row]) * np.linalg.norm(basis, axis=1))[:2]
        weight[row] = z[row, best] @ basis[best]
        others += set(best) != set(np.argsort(-np.abs(z[row]))[:2])
    assert others  # the lengths of the atoms have a say
    x = normal(3, 4, 5, seed=3)
    want = x.numpy() @ weight.T + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach(), want, atol=1e-12)
    np.testing.assert_allclose(layer.dense_weight().detach(), weight, atol=1e-12)


@pytest.mark.parametrize("make", [coefficients, through_weight])
def test_gradients_pass_straight_through(make: Any) -> None:
    """dZ = dŴ Dᵀ also where Z is masked out, dW = dŴ, and dD = Cᵀ dŴ."""
    layer = make()
    x, gradient = normal(9, 5, seed=3), normal(9, 7, seed=4)
    layer(x).backward(gradient)
    dense = gradient.T @ x  # (out, in)
    basis = layer.basis.weight
    if isinstance(layer, LatentCoefficients):
        want = dense @ basis.detach().T
        assert bool((layer.latent.grad[~layer.mask] != 0).all())
    else:
        want = dense
    torch.testing.assert_close(layer.latent.grad, want)
    code = torch.zeros(7, 6, dtype=torch.float64)
    value, index = layer.code()
    code.scatter_(1, index, value.detach())
    assert int((code != 0).sum()) == 14
    torch.testing.assert_close(basis.grad, code.T @ dense)


@pytest.mark.parametrize("make", [coefficients, through_weight])
def test_gradients_of_basis_bias_and_input_agree_with_differences(make: Any) -> None:
    check_differences(make(), normal(3, 5, seed=3), names=["basis.weight", "bias"])


def test_the_start_is_the_decomposition_and_the_rest_lies_below_it() -> None:
    target = normal(20, 16)
    model = one_layer(target)
    weight = model[0].weight.detach().clone()
    want = lowrank.linalg.dense_sparse_code(weight, 8, 3)
    STF(model, sgd(model), rank=8, density=3 / 8)
    layer = model[0]
    torch.testing.assert_close(
        layer.dense_weight().detach(), want.coefficients() @ want.basis, rtol=0, atol=1e-10
    )
    assert torch.equal(layer.code()[1], want.atoms)
    others = layer.latent.detach()[~layer.mask].view(20, 5)
    assert bool((others != 0).any(1).all())
    assert layer.choose() == 0  # none of them is chosen yet


def union(seed: int = 0) -> tuple[DenseSparseLinear, Tensor]:
    """Three of 10 atoms in every row, and a weight of the same atoms, but others in most rows."""
    rng = np.random.default_rng(seed)
    basis = normal(10, 16, seed=seed)

    def code() -> tuple[Tensor, Tensor]:
        index = np.stack([np.sort(rng.permutation(10)[:3]) for _ in range(40)])
        return torch.from_numpy(rng.uniform(1, 2, (40, 3))), torch.from_numpy(index)

    layers = [DenseSparseLinear.from_code(basis, *code(), None) for _ in range(2)]
    return layers[0], layers[1].dense_weight().detach()


def test_the_support_follows_the_task_where_a_fixed_one_cannot() -> None:
    losses = {}
    for way in ("stf", "fixed"):
        layer, target = union()
        model = nn.Sequential(layer)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        controller = STF(model, optimizer, every=1 if way == "stf" else 10**6)
        losses[way] = fit(model, optimizer, controller, target, 400, mean_of_outputs)[-1]
        entered = controller.finish()[0] and controller.history[-2]["entered"]
        assert (entered > 0) == (way == "stf")
    assert losses["stf"] < 0.8 * losses["fixed"]


@LATENTS
@pytest.mark.parametrize("freeze", [None, 12])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_finished_it_has_exactly_s_coefficients_a_row(
    latent: Any, freeze: int | None, optimizer: str, tmp_path: Path
) -> None:
    model = Net()
    kinds: dict[str, Any] = {"sgd": sgd, "adam": lambda m: torch.optim.AdamW(m.parameters(), 0.01)}
    live = kinds[optimizer](model)
    controller = STF(model, live, ratio=0.7, latent=latent, every=2, freeze=freeze)
    bias = model.first.bias
    check_same_parameters(live, model)
    run(model, live, controller, 30, each=lambda _: check_same_parameters(live, model))
    x = torch.randn(5, 12)
    before = model(x)
    counts = controller.counts
    assert controller.finish() is model
    check_same_parameters(live, model)
    assert model.first.bias is bias
    torch.testing.assert_close(model(x), before)
    for name, count in counts.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, DenseSparseLinear)
        assert (layer.coefficients() != 0).sum(1).tolist() == [count] * layer.out_features
        dense = layer.out_features * layer.in_features * 4
        assert layer.cost().bytes <= 0.7 * dense
        entry = next(h for h in controller.history if h["event"] == "freeze" and h["site"] == name)
        assert entry["step"] == (freeze or 30)
    lowrank.save(model, tmp_path)
    again = lowrank.load(tmp_path, Net(seed=4))
    torch.testing.assert_close(again(x), model(x))
    live.zero_grad()  # and it trains on
    model(x).sum().backward()
    live.step()


def test_frozen_the_coefficients_keep_their_moments() -> None:
    model = Net()
    live = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = STF(model, live, ratio=0.7)
    run(model, live, controller, 10)
    latent, mask = model.first.latent, model.first.mask.clone()
    moments = {k: v.clone() for k, v in live.state[latent].items()}
    atoms = model.first.basis.weight
    controller.finish()
    assert model.first.basis.weight is atoms
    state = live.state[model.first.value]
    assert state["step"] == moments["step"]
    for name in ("exp_avg", "exp_avg_sq"):
        want = moments[name][mask].view_as(state[name])
        torch.testing.assert_close(state[name], want)


def test_once_frozen_the_support_rests_and_the_values_learn() -> None:
    model = Net()
    live = sgd(model)
    controller = STF(model, live, ratio=0.7, freeze=5)
    run(model, live, controller, 5)
    index, value = model.first.index.clone(), model.first.value.detach().clone()
    assert controller.frozen
    run(model, live, controller, 15, start=5)
    assert torch.equal(model.first.index, index)
    assert not torch.equal(model.first.value, value)


def test_decay_shrinks_what_is_not_chosen_and_nothing_else() -> None:
    model = Net()
    live = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = STF(model, live, ratio=0.7, decay=0.5, every=10**6)
    latent, mask = model.first.latent, model.first.mask.clone()
    before = latent.detach().clone()
    live.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    controller.before_step()
    live.step()
    controller.after_step()
    torch.testing.assert_close(latent.detach()[~mask], 0.95 * before[~mask])
    assert torch.equal(latent.detach()[mask], before[mask])


@LATENTS
def test_layers_that_were_compressed_keep_their_sizes_and_moments(latent: Any) -> None:
    data = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    model, _ = lowrank.compress(
        Net(width=32), 0.6, method="dense-sparse", data=data, unit="bytes", progress=False
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DenseSparseLinear)}
    assert layers
    live = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.randn(6, 12)
    model(x).square().sum().backward()
    live.step()
    before, bias = model(x).detach(), {n: m.bias for n, m in layers.items()}
    sizes = {n: (m.rank, m.count) for n, m in layers.items()}
    moments = {n: live.state[m.value]["exp_avg"].clone() for n, m in layers.items()}
    index = {n: m.index.long().clone() for n, m in layers.items()}
    controller = STF(model, live, latent=latent)
    check_same_parameters(live, model)
    assert {n: (controller.ranks[n], controller.counts[n]) for n in sizes} == sizes
    torch.testing.assert_close(model(x), before)
    if latent == "coefficients":
        for name in layers:
            state = live.state[model.get_submodule(name).latent]["exp_avg"]
            torch.testing.assert_close(state.gather(1, index[name]), moments[name])
            assert int((state != 0).sum()) <= index[name].numel()
    run(model, live, controller, 8)
    controller.finish()
    for name, layer in layers.items():
        got = model.get_submodule(name)
        assert (got.rank, got.count) == sizes[name]
        assert got.bias is bias[name]
        assert got is not layer


def test_dense_layers_without_a_size_are_left_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(24, 24), DenseSparseLinear(24, 24, 8, 2))
    controller = STF(model, sgd(model))
    assert isinstance(model[0], nn.Linear)
    assert controller.history[0]["reason"].startswith("a dense layer: no ratio or rank")


def test_a_weight_is_coded_anew_every_few_steps() -> None:
    target = normal(20, 16)
    model = one_layer(target)
    live = torch.optim.SGD(model.parameters(), lr=0.05)
    controller = STF(model, live, rank=8, density=0.25, latent="weight", every=4)
    layer = model[0]
    for step in range(1, 9):
        before = layer.value.clone()
        fit(model, live, controller, target, 1, mean_of_outputs)
        assert torch.equal(before, layer.value) == (step % 4 != 0)
    basis, weight = layer.basis.weight.detach(), layer.latent.detach()
    value, index = pursuit(weight @ basis.T, basis @ basis.T, 2)
    assert torch.equal(layer.index.long(), index)
    torch.testing.assert_close(layer.value, value)


def test_transformers_own_layout_comes_back(tmp_path: Path) -> None:
    from tests.zoo import make, tokens

    model = make("gpt2")
    live = sgd(model)
    controller = STF(model, live, ratio=0.7, target_modules=["c_fc"], latent="weight")
    controller.finish()
    layer = model.transformer.h[0].mlp.c_fc
    assert (type(layer), layer.layout) == (DenseSparseLinear, "conv1d")
    want = model(input_ids=tokens()).logits
    dense = lowrank.to_dense(copy.deepcopy(model))
    assert type(dense.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    torch.testing.assert_close(dense(input_ids=tokens()).logits, want, rtol=1e-4, atol=1e-5)


def test_a_state_of_other_sizes_is_refused() -> None:
    model = Net()
    small = STF(model, sgd(model), ratio=0.5).state_dict()
    frozen = Net()
    done = STF(frozen, sgd(frozen), ratio=0.7, freeze=1)
    fresh = done.state_dict()
    run(frozen, sgd(frozen), done, 1)
    for state, said in (
        (small, "has the size .* in this state and"),
        (fresh, "the support is not frozen in this state, but here it is"),
        (
            {**fresh, "policy": {**fresh["policy"], "latent": "weight"}},
            "saved with latent='weight'",
        ),
    ):
        before = done.state_dict()
        with pytest.raises(LowrankError, match=said):
            done.load_state_dict(state)
        assert done.state_dict() == before


def test_dead_rows_and_16_bits() -> None:
    model = Net()
    with torch.no_grad():
        model.first.weight[:3] = 0
    controller = STF(model, sgd(model), ratio=0.7)
    assert model.first.latent.detach()[:3].abs().max() == 0
    assert (model.first.mask.sum(1) == controller.counts["first"]).all()
    half = Net().bfloat16()
    with pytest.raises(LowrankError, match="keep weights in fp32 and train with autocast"):
        STF(half, sgd(half), ratio=0.7)
