"""Concepts are found where they were planted; numbers in random order hold none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from tests.zoo import mlp, unchanged


def planted() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """Images of two concepts, each of its own channels, on the left and on the right half."""
    generator = torch.Generator().manual_seed(0)
    strength = 0.5 + torch.rand(6, 1, 8, 8, generator=generator)
    parts = torch.zeros(2, 5)
    parts[0, :2], parts[1, 2:] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0, 1.0])
    left = (torch.arange(8) < 4).float().expand(8, 8)
    halves = torch.stack([left, 1 - left])
    images = strength * torch.einsum("khw,kc->chw", halves, parts)
    return nn.Sequential(nn.Conv2d(5, 2, 3)), images, halves


def test_maps_are_where_the_concepts_are() -> None:
    net, images, halves = planted()
    with unchanged(net):
        found = lowrank.concepts(net, list(images.split(4)), "0", count=2, progress=False)
    assert found.maps.shape == (6, 8, 8, 2)
    assert found.error < 1e-3
    assert not found.signed
    # The right half has more energy (11 against 5), so that it comes first.
    for column, half in enumerate((halves[1], halves[0])):
        inside = found.maps[..., column].mean(0)
        assert inside[half == 0].max() < 0.02 * inside[half == 1].min()
    assert found.parts[0, 2:].tolist() == pytest.approx([3 / 11**0.5, 11**-0.5, 11**-0.5], abs=0.01)
    again = lowrank.concepts(net, images, "0", count=2, progress=False)
    assert torch.equal(again.maps, found.maps)


def test_features_of_any_sign_have_signed_parts() -> None:
    net = mlp(6, 4)
    x = torch.rand(50, 2) @ torch.tensor([[1.0, -1, 2, 0, 0, 1], [0, 2, 0, -3, 1, 0]])
    found = lowrank.concepts(net, x, "0", count=2, progress=False)
    assert found.signed
    assert (found.maps >= 0).all()
    assert found.error < 1e-2
    assert found.parts.norm(dim=1).tolist() == pytest.approx([1, 1])


def test_peek_tells_order_from_chance() -> None:
    net, images, _ = planted()
    found = lowrank.peek(net, images, counts=(1, 2, 6), positions=200, progress=False)
    one, two, many = found.error[0].tolist()
    assert one > 0.3
    assert two < 1e-2
    assert math.isnan(many)  # of five features
    assert found.shuffled[0, 1] > 0.1
    row = found.rows()[0]
    assert row["2"] == f"{two:.3f} ({float(found.shuffled[0, 1]):.3f})"
    assert row["6"] == ""
    assert "shuffled" in str(found)


def test_what_does_not_fit_is_refused() -> None:
    net, images, _ = planted()
    with pytest.raises(LowrankError, match=r"unknown layer '1' \(known: 0\)"):
        lowrank.concepts(net, images, "1", progress=False)
    with pytest.raises(LowrankError, match="at most 5, the number of features, got 6"):
        lowrank.concepts(net, images, "0", count=6, progress=False)
    with pytest.raises(LowrankError, match="at least 1, got 0"):
        lowrank.peek(net, images, counts=(0,), progress=False)
    with pytest.raises(LowrankError, match="at least one number of concepts"):
        lowrank.peek(net, images, counts=(), progress=False)
    with pytest.raises(LowrankError, match="positions must be at least 1"):
        lowrank.peek(net, images, positions=0, progress=False)
    shapes = [images, images[..., :6]]
    with pytest.raises(LowrankError, match="inputs of one shape"):
        lowrank.concepts(net, shapes, "0", count=2, progress=False)
