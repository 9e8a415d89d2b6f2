"""The factor of the logits: found, put into the last norm, and left alone where nothing scales."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Recovery
from lowrank.measure.eval import Reference
from lowrank.recover.copies import Pairs
from lowrank.recover.temperature import temper
from tests import zoo


class Shifted(nn.Module):
    """A norm whose weight counts from one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:]) * (1 + self.weight)


class Net(nn.Module):
    def __init__(self, norm: nn.Module, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.before = nn.Linear(6, 12), nn.LayerNorm(12)
        self.norm, self.head = norm, nn.Linear(12, 9, bias=bias)
        self.temper = 1.0
        for vector in norm.parameters():
            nn.init.normal_(vector)

    def forward(self, x: Tensor) -> Tensor:
        return self.temper * self.head(self.norm(self.before(self.first(x))))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 * torch.randn(8, 6, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, Shifted])
@pytest.mark.parametrize("sharp", [1.25, 0.9])
def test_the_factor_is_found_and_put_into_the_norm(norm: Any, sharp: float) -> None:
    dense = Net(norm(12))
    lean: Net = copy.deepcopy(dense)
    pairs: Pairs = {}
    lean.temper, shared = sharp, lean.norm.weight
    before = shared.clone()
    away = Reference(dense, batches()).kl(lean)
    factor, without = temper(lean, Reference(dense, batches()), pairs)
    assert without == pytest.approx(away)
    assert factor == pytest.approx(1 / sharp, rel=0.01)
    for batch in batches():
        torch.testing.assert_close(lean(batch), sharp * factor * dense(batch))
    assert torch.equal(shared, before)  # in a copy of its own
    assert [own is lean.norm.weight for _, own in pairs.values()].count(True) == 1


def test_nothing_is_scaled_where_no_norm_scales_the_logits() -> None:
    dense = Net(nn.LayerNorm(12), bias=True)  # of the head, which no norm scales
    dense.head.bias.data *= 20
    lean = copy.deepcopy(dense)
    lean.temper = 1.5
    before = copy.deepcopy(lean.state_dict())
    assert temper(lean, Reference(dense, batches()), {})[0] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in lean.state_dict().items())


def test_values_have_no_temperature() -> None:
    dense = zoo.Custom(
        lambda self, x: {"last_hidden_state": self.net(x)}, net=Net(nn.LayerNorm(12))
    )
    lean = copy.deepcopy(dense)
    lean.net.temper = 1.5
    assert temper(lean, Reference(dense, [{"x": batch} for batch in batches()]), {})[0] == 1.0


def test_compress_says_so_and_it_can_be_switched_off() -> None:
    torch.manual_seed(0)
    model = zoo.llama(tie_word_embeddings=False).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 8
    data = list(torch.randint(61, (32, 9), generator=torch.Generator().manual_seed(0)).split(8))
    found = []
    for wanted in (True, False):
        lean, report = lowrank.compress(
            model, 0.3, data=data, method="whitened", policy="uniform",
            effort=Recovery(temperature=wanted), copy=True, progress=False,
        )  # fmt: skip
        assert ("logits scaled by 0." in str(report.notes)) == wanted
        assert torch.equal(lean.model.norm.weight, model.model.norm.weight) != wanted
        found.append(lowrank.kl(lean, model, data[-1:]))
    assert found[0] < found[1]
