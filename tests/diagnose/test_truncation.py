"""What is zeroed is smallest, and costs no more than was allowed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank.diagnose import features
from lowrank.diagnose.truncation import smallest
from tests.zoo import mlp, unchanged

X = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))


def test_the_smallest_go_as_far_as_their_energy_reaches() -> None:
    x = torch.tensor([[3.0, -1.0, 0.0, 2.0, -1.0], [1.0, 1.0, 1.0, 1.0, 10.0]])  # 15 and 104
    assert smallest(x, 0.0).int().tolist() == [[0, 0, 1, 0, 0], [0] * 5]
    assert smallest(x, 2 / 15 + 1e-9).int().tolist() == [[0, 1, 1, 0, 1], [1, 1, 1, 1, 0]]
    assert smallest(x, 1.0).all()
    assert smallest(torch.zeros(2, 3), 0.0).all()


def truncated(model: nn.Module, x: Tensor, share: float) -> Tensor:
    """The same by hand, for two layers with a ReLU between them."""
    for layer in (model[0], model[2]):  # type: ignore[index]
        order = x.abs().argsort(1)
        energy = x.gather(1, order).double().square().cumsum(1)
        gone = torch.zeros_like(x, dtype=torch.bool).scatter(
            1, order, energy <= share * energy[:, -1:]
        )
        x = layer(x.masked_fill(gone, 0))
        x = torch.relu(x) if layer is model[0] else x  # type: ignore[index]
    return x


def test_the_loss_is_kept_and_used_up() -> None:
    model = mlp(24, 32, 10)
    model[2].weight.data *= 8
    dropped = []
    for loss in (0.01, 0.1, 1.0):
        with unchanged(model):
            found = features(model, list(X.split(16)), loss=loss, progress=False)
        assert (found.loss, found.measure) == (loss, "KL")
        dropped.append([site.dropped for site in found.sites])
        assert found["2"].dropped >= found["2"].zeros  # type: ignore[operator]
    for before, after in itertools.pairwise(dropped):
        assert all(a < b for a, b in zip(before, after, strict=True))
    assert all(0 < share < 1 for shares in dropped for share in shares)

    with torch.no_grad():
        dense = model(X).log_softmax(1)

        def away(share: float) -> float:
            other = truncated(model, X, share).log_softmax(1)
            return float((dense.exp() * (dense - other)).sum(1).mean())

        best = max(s for n in range(257) if away(s := (n / 256) ** 2) <= 0.1)
    assert dropped[1][0] == pytest.approx(float(smallest(X, best).double().mean()), abs=0.01)


def test_channels_of_a_convolution_are_zeroed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(),
                        nn.Linear(64, 5))  # fmt: skip
    images = torch.randn(4, 3, 8, 8)
    every = lowrank.features(net, images, loss=1e9, progress=False)
    # All but the largest of three, six and many, which alone exceed the rest.
    assert [site.dropped >= 0.6 for site in every.sites] == [True] * 3  # type: ignore[operator]
    few = lowrank.features(net, images, loss=1e-5, progress=False)
    assert few["2"].zeros <= few["2"].dropped < 0.9  # type: ignore[operator]
