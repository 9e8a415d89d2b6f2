"""Sparsification without data: the spectrum, what is drawn, and what data may not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank
from lowrank import LowrankError, linalg
from lowrank.methods import LowRankMasked, SpectralMasked
from lowrank.types import Cost, Option, Statistics
from tests.zoo import mlp

from .layers import inputs, linear, site, statistics


def size(rank: int, count: int) -> Option:
    return Option("spectral-masked", (rank, count), "lowrank-masked", Cost(0, 0, 0), 0.0)


def directions_and_entries(outs: int, ins: int, seed: int) -> Tensor:
    """Four directions hidden among many small entries, and some large ones."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    large = (torch.rand(outs, ins, generator=rng) < 0.05) * 6 * normal(outs, ins)
    return normal(outs, 4) @ normal(4, ins) + large + 0.3 * normal(outs, ins)


def test_it_keeps_the_leading_directions_that_pruning_turns() -> None:
    """Beside as many entries of the weight as it stores numbers, the largest and random ones."""
    for seed in range(3):
        weight = directions_and_entries(48, 40, seed)
        layer = linear(48, 40)
        with torch.no_grad():
            layer.weight.copy_(weight)
        count = 480
        new: Any = SpectralMasked().factor(layer, size(4, count - 4 * 88), Statistics())
        pruned = weight * linalg.largest(count)(weight.abs())
        chance = weight * linalg.drawn(count, 0.0, seed)(torch.ones_like(weight))
        spectral = [
            linalg.spectral_error(weight, each) for each in (new.dense_weight(), pruned, chance)
        ]
        angles = [
            linalg.subspace_angle(weight, each, 4) for each in (new.dense_weight(), pruned, chance)
        ]
        assert spectral[0] < 0.7 * spectral[1] < 0.7 * spectral[2]
        assert angles[0] < 0.7 * angles[1]


def test_data_change_nothing() -> None:
    """It is `lowrank-masked` for inputs that are alike, whatever the inputs are."""
    layer, option = linear(12, 18), size(2, 50)
    gram = torch.diag(torch.linspace(0.01, 9, layer.weight.shape[1], dtype=torch.float64))
    alone = SpectralMasked().factor(layer, option, Statistics()).dense_weight()
    with_data = SpectralMasked().factor(layer, option, Statistics(count=9, gram=gram))
    alike = Statistics(count=9, gram=torch.eye(len(gram), dtype=torch.float64))
    assert torch.equal(with_data.dense_weight(), alone)
    torch.testing.assert_close(LowRankMasked().factor(layer, option, alike).dense_weight(), alone)
    curve = SpectralMasked().curve(site(layer), statistics(inputs(len(gram))))
    assert curve.norm == "weight"
    assert curve.total == pytest.approx(float(layer.weight.detach().square().sum()))
    nearest = [o for o in curve.options if o.size][-1]
    new = SpectralMasked().factor(layer, nearest, Statistics())
    lost = float((new.dense_weight() - layer.weight).detach().square().sum())
    assert 0.3 * nearest.error <= lost <= 1.3 * nearest.error


def test_what_is_drawn_follows_the_squares() -> None:
    """w² of 1 and 4: the larger of two is kept four times of five; the sure ones always are."""
    first = sum(bool(linalg.drawn(1, 0.0, s)(torch.tensor([1.0, 2.0]))[1]) for s in range(2000))
    assert first / 2000 == pytest.approx(0.8, abs=0.03)
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).abs()
    largest = linalg.largest(90)(weight)
    masks = [linalg.drawn(100, 0.9, seed)(weight) for seed in (0, 0, 1)]
    assert all(int(mask.sum()) == 100 and bool(mask[largest].all()) for mask in masks)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(linalg.drawn(100, 1.0, 0)(weight), linalg.largest(100)(weight))
    weight[5:] = 0  # as many as are left are drawn, and then zeros
    assert bool(linalg.drawn(120, 0.5, 0)(weight)[:5].all())


def test_draws_are_apart_from_weights_of_the_same_seed() -> None:
    """Else entries of some sizes or signs would be drawn, and not as many of all."""
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        weight = torch.randn(96, 96, generator=rng, dtype=torch.float64)
        kept = linalg.drawn(2765, 0.0, seed)(torch.ones_like(weight))
        assert abs(float(weight[kept].mean())) < 0.06
        assert linalg.spectral_error(weight, weight * kept) < 0.9


def test_no_share_of_drawn_entries_is_nearer_than_none() -> None:
    """With heavy tails (Student's t, three degrees of freedom) as with normal entries."""
    rng = torch.Generator().manual_seed(0)
    for heavy in (False, True):
        errors = []
        for _ in range(3):
            weight = torch.randn(96, 96, generator=rng, dtype=torch.float64)
            if heavy:
                chi = torch.randn(3, 96, 96, generator=rng, dtype=torch.float64)
                weight = weight / (chi.square().mean(0)).sqrt()
            errors.append([
                linalg.spectral_error(weight, weight * linalg.drawn(2000, share, 0)(weight.abs()))
                for share in (1.0, 0.9, 0.5, 0.0)
            ])  # fmt: skip
        means = torch.tensor(errors).mean(0)
        assert bool((means.diff() > 0).all())


def test_without_data_and_saved(tmp_path: Path) -> None:
    """Drawn entries too; at equal numbers it is nearer than low rank where entries stand out."""
    dense = mlp(24, 32, 20)
    with torch.no_grad():
        for layer in (dense[0], dense[2]):
            layer.weight.copy_(directions_and_entries(*layer.weight.shape, seed=1) / 8)
    both = {"data": None, "target_modules": ["0", "2"], "copy": True, "progress": False}
    way = SpectralMasked(certain=0.9, iterations=8)
    small, report = lowrank.compress(dense, 0.6, method=way, **both)
    assert {entry.method for entry in report.plan.entries} == {"spectral-masked"}
    lowrank.save(small, tmp_path)
    again = lowrank.load(tmp_path, mlp(24, 32, 20))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), small(x))
    assert all(torch.equal(t, again.state_dict()[key]) for key, t in small.state_dict().items())
    plain, _ = lowrank.compress(dense, 0.6, method="svd", **both)
    with torch.no_grad():
        away = [float((model(x) - dense(x)).square().mean()) for model in (small, plain)]
    assert away[0] < 0.5 * away[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"certain": 1.1}, r"certain must be a share in \[0, 1\], got 1.1"),
        ({"certain": float("nan")}, "certain must be a share"),
        ({"certain": 0.9, "pattern": (2, 4)}, r"does not give \(2, 4\): leave certain at 1"),
        ({"pattern": "2:4"}, "pattern must be 'unstructured' or"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LowrankError, match=said):
        SpectralMasked(**options)


def test_the_name_tells_the_pattern() -> None:
    layer = linear(12, 16)
    curve = SpectralMasked(pattern=(2, 4), iterations=2).curve(site(layer), Statistics())
    assert {option.method for option in curve.options if option.size} == {"spectral-2:4"}
