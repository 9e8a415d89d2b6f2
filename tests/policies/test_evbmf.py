"""evbmf: planted ranks above noise, shared down where the budget is smaller."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import lowrank
from lowrank.errors import LowrankError
from lowrank.linalg import evbmf_rank
from lowrank.nn import ChannelConv, TuckerConv
from lowrank.policies import EVBMF
from lowrank.types import Budget

from .curves import curve, spent


def planted(rows: int, columns: int, rank: int, seed: int) -> torch.Tensor:
    """Components five times above noise of variance one."""
    rng = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=rng), torch.randn(rank, columns, generator=rng)
    return 5 * left @ right / rank**0.5 + torch.randn(rows, columns, generator=rng)


def curves_of(*matrices: torch.Tensor):
    return [
        curve(f"site{i}", tuple(m.shape), torch.linalg.svdvals(m.double()).tolist())
        for i, m in enumerate(matrices)
    ]


def test_ranks_are_what_stands_above_the_noise_where_the_budget_is_theirs() -> None:
    matrices = [planted(48, 40, 3, 0), planted(40, 48, 7, 1), planted(30, 90, 5, 2)]
    curves = curves_of(*matrices)
    theirs = sum(k * sum(m.shape) for k, m in zip((3, 7, 5), matrices, strict=True))
    found = EVBMF()(curves, Budget(theirs))
    ranks = [found[one.sites].size for one in curves]
    assert ranks == [(3,), (7,), (5,)]
    assert ranks == [(evbmf_rank(m),) for m in matrices]


def test_another_budget_takes_the_same_multiple_of_all_and_is_met() -> None:
    curves = curves_of(planted(48, 40, 4, 0), planted(40, 48, 8, 1), planted(60, 60, 12, 2))
    theirs = 4 * 88 + 8 * 88 + 12 * 120
    for share in (0.3, 0.5, 0.9, 1.4):
        limit = Budget(int(share * theirs))
        found = EVBMF()(curves, limit)
        assert 0.85 * limit.limit <= spent(found) <= limit.limit
        kept = [found[one.sites].size[0] / k for one, k in zip(curves, (4, 8, 12), strict=True)]
        assert max(kept) - min(kept) <= 0.5 / 4 + 0.5 / 8  # up to rounding of small ranks
    assert all(option.dense for option in EVBMF()(curves, Budget(10**9)).values())


def test_noise_alone_and_bad_input() -> None:
    noise = torch.randn(40, 50, generator=torch.Generator().manual_seed(3))
    curves = curves_of(noise)
    assert EVBMF()(curves, Budget(100))[curves[0].sites].size == (1,)
    assert EVBMF(least=6)(curves, Budget(600))[curves[0].sites].size == (6,)
    with pytest.raises(LowrankError, match="at least one component"):
        EVBMF(least=0)
    with pytest.raises(LowrankError, match="site0 have none"):
        EVBMF()([replace(curves[0], spectrum=None)], Budget(10**9))
    with pytest.raises(LowrankError, match="increase it"):
        EVBMF(least=6)(curves, Budget(1))


def test_it_serves_convolutions_by_name() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1)
    last, first = torch.randn(16, 2), torch.randn(2, 16)
    core = torch.randn(2, 2, 9)
    planted_weight = torch.einsum("op,pjk,ji->oik", last, core, first)
    with torch.no_grad():
        conv.weight.copy_((planted_weight + 0.1 * torch.randn(16, 16, 9)).view(16, 16, 3, 3))
    net = nn.Sequential(conv, nn.ReLU())
    lean, report = lowrank.compress(
        net, 0.15, method="tucker", policy="evbmf", copy=True, progress=False
    )
    assert isinstance(lean[0], ChannelConv | TuckerConv)
    assert lean[0].cost().params <= 2 * (16 + 16 * 9)  # two components, in the cheaper form
    assert 0 < report.achieved <= 0.15
