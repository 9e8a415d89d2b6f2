"""compare: distances of the stored factors, by numpy; the random choice is of the same size."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

import lowrank
from lowrank import LowrankError
from lowrank.diagnose.comparison import random_choice
from tests.zoo import make, mlp, unchanged

BOTH = {"target_modules": ["0", "2"], "copy": True, "progress": False}


def test_distances_are_those_of_the_stored_factors() -> None:
    dense = mlp(24, 16, 20)
    small, _ = lowrank.compress(dense, rank=4, **BOTH)
    with unchanged(dense), unchanged(small):
        found = lowrank.compare(dense, small, top=3)
    site = found["2"]
    w = dense[2].weight.detach().double().numpy()
    s = small[2].dense_weight().detach().double().numpy()
    assert site.distance is not None
    assert site.random is not None
    assert site.distance.frobenius == pytest.approx(np.linalg.norm(w - s) / np.linalg.norm(w))
    assert site.distance.spectral == pytest.approx(np.linalg.norm(w - s, 2) / np.linalg.norm(w, 2))
    assert site.distance.angle == pytest.approx(0, abs=1e-2)
    assert (site.rank, site.top, site.shape) == (4, 3, (20, 16))
    assert site.random.frobenius > site.distance.frobenius
    assert site.random.angle > 20
    assert found["2"] == lowrank.compare(dense, small, top=3)["2"]
    assert found["2"].random != lowrank.compare(dense, small, top=3, seed=1)["2"].random
    row = found.rows()[1]
    assert row["random error"] == f"{site.random.frobenius:.3f}"
    assert "beside a random choice" in str(found)
    assert json.loads(found.to_json())["sites"][1]["distance"]["angle"] == site.distance.angle


def test_pruning_of_the_same_size_stands_beside_it() -> None:
    """The largest entries, as many as the factors have numbers."""
    dense = mlp(24, 16, 20)
    small, _ = lowrank.compress(dense, rank=4, **BOTH)
    pruned = lowrank.compare(dense, small, top=3)["2"].pruned
    w = dense[2].weight.detach().double().numpy()
    least = np.sort(np.abs(w), axis=None)[-4 * (16 + 20)]
    s = np.where(np.abs(w) >= least, w, 0)
    assert pruned is not None
    assert pruned.frobenius == pytest.approx(np.linalg.norm(w - s) / np.linalg.norm(w))
    assert pruned.spectral == pytest.approx(np.linalg.norm(w - s, 2) / np.linalg.norm(w, 2))
    ours, theirs = (np.linalg.svd(m, compute_uv=False) for m in (w, s))
    apart = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
    assert pruned.values == pytest.approx(apart)
    row = lowrank.compare(dense, small, top=3).rows()[1]
    assert row["pruned spectral"] == f"{pruned.spectral:.3f}"
    assert row["pruned values"] == f"{pruned.values:.3f}"


def test_the_random_choice_is_of_the_same_size() -> None:
    w = torch.randn(12, 9, generator=torch.Generator().manual_seed(0)).double()
    drawn = random_choice(w, 4, 84, torch.Generator().manual_seed(0))
    assert int(torch.linalg.matrix_rank(drawn)) == 4
    # A projection: what it leaves is at right angles to what it keeps.
    assert float(((w - drawn) * drawn).sum()) == pytest.approx(0, abs=1e-9)
    few = random_choice(w, None, 30, torch.Generator().manual_seed(0))
    assert int((few != 0).sum()) == 30
    assert torch.equal(few, torch.where(few != 0, w, 0))


def test_forms_without_one_rank_are_compared_with_random_entries() -> None:
    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Conv2d(16, 24, 3))
    small, _ = lowrank.compress(
        dense, 0.5, method="tucker", target_modules=["0"], data=None, copy=True, progress=False
    )
    site = lowrank.compare(dense, small).sites[0]
    assert site.random is not None
    # A share of the entries at random leaves about that share of the energy.
    assert site.random.frobenius == pytest.approx((1 - site.kept) ** 0.5, abs=0.06)


def test_experts_are_compared_one_by_one() -> None:
    dense = make("mixtral")
    small, _ = lowrank.compress(dense, 0.5, data=None, copy=True, progress=False)
    found = lowrank.compare(dense, small)
    assert any("experts" in site.name for site in found.sites)
    assert all(site.distance is not None for site in found.sites)


def test_layers_of_another_model_say_so() -> None:
    dense = mlp(24, 16, 20)
    small, _ = lowrank.compress(dense, rank=4, **BOTH)
    other = copy.deepcopy(dense)
    other[0] = torch.nn.Linear(24, 17)
    del other[2]
    reasons = [site.reason for site in lowrank.compare(other, small).sites]
    assert reasons == [
        "the first model's is of shape (17, 24)",
        "the first model has no such layer",
    ]
    with pytest.raises(LowrankError, match="second model has no factored layer"):
        lowrank.compare(small, dense)
    with pytest.raises(LowrankError, match="top must be at least 1, got 0"):
        lowrank.compare(dense, small, top=0)
