"""Which modules become layers, and why others do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowrank.nn.splits import KINDS, SPLITS, obstacle_to_split


def _weight_norm() -> nn.Module:
    return parametrizations.weight_norm(nn.LSTM(4, 6), "weight_hh_l0")


def _pruned() -> nn.Module:
    module = nn.ConvTranspose2d(16, 16, 3)
    prune.l1_unstructured(module, "weight", 0.5)
    return module


def _wrapped() -> nn.Module:
    module: Any = nn.GRU(4, 6)
    module.forward = lambda *_: None
    return module


class Own(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.MultiheadAttention(8, 2), ""),
        (nn.Conv2d(64, 64, 3, groups=4), ""),
        (nn.Conv2d(8, 8, 3, groups=8), "its 8 groups of 1 channels are matrices of 1 by 9"),
        (nn.Conv2d(128, 128, 3, groups=32), "its 32 groups of 4 channels are matrices of 4 by 36"),
        (nn.Conv2d(8, 8, 3), "one group"),
        (nn.ConvTranspose2d(2, 1, 2), "matrix of 4 by 2"),
        (_pruned(), "not a plain parameter"),
        (_wrapped(), "forward is wrapped"),
        (nn.Linear(4, 4), None),
        (Own(8, 2), None),  # it may compute anything
        (_weight_norm(), None),  # torch makes a class of its own
        (nn.LSTM(4, 6).to(torch.float64), ""),
    ],
)
def test_what_can_be_split(module: nn.Module, reason: str | None) -> None:
    found = obstacle_to_split(module)
    assert found == reason if not reason else reason in str(found)


def test_the_registry_has_a_kind_for_each_class() -> None:
    assert len(SPLITS) == len(KINDS)
    assert all(issubclass(kind, whole) for whole, kind in SPLITS.items())
