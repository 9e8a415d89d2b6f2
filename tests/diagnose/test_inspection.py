"""inspect reads back what was planted, and says what it did not look at."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from tests.zoo import inputs_of, make, mlp, said, tokens, unchanged

X = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))


def planted(out: int, inputs: int, values: list[float]) -> nn.Sequential:
    """One layer of exactly these singular values."""
    generator = torch.Generator().manual_seed(1)

    def basis(n: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(n, len(values), generator=generator).double()).Q

    weight = basis(out) @ torch.tensor(values).double().diag() @ basis(inputs).T
    layer = nn.Linear(inputs, out, bias=False).double()
    layer.weight.data = weight
    return nn.Sequential(layer)


def test_a_planted_spectrum_is_read_back() -> None:
    values = [8.0, 4.0, 2.0, 1.0]
    found = lowrank.inspect(planted(24, 16, values), progress=False)["0"]
    assert found.weight is not None
    assert found.weight.values[:4].tolist() == pytest.approx(values)
    p = np.array(values) ** 2 / 85
    assert found.weight.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    q = np.array(values) / 15
    # Twelve more directions, each rounded to about 1e-7 of the first.
    assert found.weight.entropy_rank == pytest.approx(np.exp(-(q * np.log(q)).sum()), rel=1e-4)
    assert found.weight.stable_rank == pytest.approx(85 / 64)
    assert [found.weight.rank_for(s) for s in (0.9, 0.95, 0.99)] == [2, 3, 4]
    assert found.weight.condition == math.inf
    assert found.break_even == math.ceil(24 * 16 / 40)
    assert (found.output, found.dense_ms, found.reason) == (None, None, "")
    whole = planted(24, 4, values)
    assert lowrank.inspect(whole, progress=False)["0"].row()["cond"] == "8e+00"


def test_outputs_are_weighed_by_the_inputs() -> None:
    model = mlp(24, 16, 8)
    inputs = inputs_of(model, ["2"], lambda: model(X))["2"]
    weight = model[2].weight.detach().double().numpy()
    outputs = inputs @ weight.T / len(inputs) ** 0.5
    with unchanged(model):
        found = lowrank.inspect(model, X, progress=False)
    site = found["2"]
    assert site.output is not None
    assert site.output.values.numpy() == pytest.approx(np.linalg.svd(outputs)[1], rel=1e-4)
    assert site.row()["eff"] == f"{site.output.effective_rank:.1f}"
    assert site.row()["eff W"] == f"{site.weight.effective_rank:.1f}"  # type: ignore[union-attr]
    assert found.tokens == 200
    assert site.input_shape == (200, 16)
    assert site.dense_ms is not None
    assert site.dense_ms > 0
    assert site.factored_ms is not None
    assert lowrank.inspect(model, X, timing=False, progress=False)["2"].dense_ms is None


def test_only_what_is_named_is_decomposed() -> None:
    model = make("llama")
    everything = lowrank.inspect(model, progress=False)
    assert all(site.weight is not None for site in everything.sites)
    assert "the output head" in everything["lm_head"].reason
    some = lowrank.inspect(model, target_modules=["q_proj"], progress=False)
    assert len(some.sites) == len(everything.sites)
    for site in some.sites:
        assert (site.weight is not None) == site.name.endswith("q_proj")
        assert (site.reason == "") == site.name.endswith("q_proj")


def test_what_cannot_be_read_carries_its_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8))
    nn.utils.parametrizations.weight_norm(model[1])
    model[2].weight.data[0, 0] = torch.nan
    good, parametrized, broken = lowrank.inspect(model, progress=False).sites
    assert (good.reason, good.weight is None) == ("", False)
    assert ("parametrized" in parametrized.reason, parametrized.weight) == (True, None)
    assert (broken.reason, broken.weight) == ("the weight holds NaN or Inf", None)
    parted = mlp(24, 8, 24)
    partly = lowrank.inspect(parted, lambda net: net[0](X), progress=False)["2"]
    assert (partly.reason, partly.output) == ("the data did not reach it", None)
    assert partly.weight is not None


def test_factored_layers_are_listed() -> None:
    model, _ = lowrank.compress(mlp(24, 16, 8), 0.5, align=1)
    site = lowrank.inspect(model, progress=False)["0"]
    assert site.rank == model[0].rank
    assert site.row()["kept"] == f"{site.rank * 40 / (24 * 16):.3f}"


def test_it_prints_and_serialises() -> None:
    found = lowrank.inspect(make("llama"), tokens(4, 16), progress=False)
    body = json.loads(found.to_json())
    assert [site["site"] for site in body["sites"]] == [site.name for site in found.sites]
    at = next(i for i, site in enumerate(found.sites) if site.output is not None)
    first = body["sites"][at]
    assert first["output"]["effective_rank"] == found.sites[at].output.effective_rank  # type: ignore[union-attr]
    assert first["break_even"] == found.sites[at].break_even
    text = str(found)
    for site in found.sites:
        assert site.name in text
    assert "outputs, 64 tokens" in text
    assert "inspection of the weights" in str(lowrank.inspect(nn.ReLU(), progress=False))
    singular = planted(24, 16, [1.0, 1.0])
    assert (
        json.loads(lowrank.inspect(singular).to_json())["sites"][0]["weight"]["condition"] is None
    )


def test_bad_patterns_and_models_are_refused() -> None:
    with pytest.raises(LowrankError) as caught:
        lowrank.inspect(mlp(8, 8), target_modules=["absent"])
    assert "'absent' matches none of 1 layers" in said(caught)
    with pytest.raises(LowrankError, match=r"expected a torch\.nn\.Module"):
        lowrank.inspect("model")  # type: ignore[arg-type]
