"""The local rank counts planted directions, by relative thresholds, in numbers and in ids."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank import LowrankError
from lowrank.diagnose import features
from lowrank.diagnose.local_rank import rank_above
from tests.zoo import make, mlp, tokens, unchanged


def test_values_count_above_a_share_of_the_largest() -> None:
    values = torch.tensor([2.0, 0.3, 0.02, 0.0])
    assert [rank_above(t, values) for t in (0.5, 1e-1, 1e-2, 1e-3)] == [1, 2, 2, 3]
    assert rank_above(0.1, torch.zeros(3)) == rank_above(0.1, values[:0]) == 0


def local(model: nn.Module, x: torch.Tensor, probes: int) -> dict[str, list[float]]:
    found = features(model, x, probes=probes, progress=False)
    return {site.name: [site.local[t] for t in found.thresholds] for site in found.sites}


def test_a_bottleneck_is_seen_in_what_follows_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3), nn.Linear(3, 10), nn.Tanh(),
                        nn.Linear(10, 9)).double()  # fmt: skip
    x = torch.randn(5, 20).double()
    with unchanged(net):
        found = local(net, x, 16)
    assert {name: ranks[1] for name, ranks in found.items()} == {"0": 12, "2": 3, "3": 3, "5": 3}


def test_thresholds_are_relative() -> None:
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data = torch.diag(torch.tensor([40.0, 0.2, 0.0]))
    assert local(nn.Sequential(layer), torch.ones(1, 3), 100) == {"0": [1, 2]}


def test_dead_units_are_at_one_example_what_they_are() -> None:
    """The rank of the layer after a ReLU is the number of units that are on, example by example."""
    net = mlp(6, 4, 5).double()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(3)).double()
    on = [int((row > 0).sum()) for row in net[0](x)]
    assert len(set(on)) > 1
    assert local(net, x, 12)["2"][1] == pytest.approx(sum(on) / 3)


def test_a_model_of_ids_is_derived_by_its_embedding() -> None:
    found = local(make("llama"), tokens(2, 6), 5)
    assert found["model.layers.0.self_attn.q_proj"] == [5, 5]
    assert set(map(len, found.values())) == {2}


def test_a_model_of_ids_without_an_embedding_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.layer(nn.functional.one_hot(ids, 4).float().sum(1))

    with pytest.raises(LowrankError, match="reads numbers, or ids by an embedding: pass probes=0"):
        features(Counts(), torch.zeros(2, 3, dtype=torch.long), probes=2, progress=False)
