"""What no site covers is named, with its parameters, in plan and report."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.walk.coverage import told, uncovered
from lowrank.walk.parts import separate_parts
from lowrank.walk.sites import find_sites
from tests.zoo import make


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.memory = nn.LSTM(16, 8)
        self.query = nn.Parameter(torch.randn(16, 3, 4))
        self.vector = nn.Parameter(torch.randn(1, 1, 16))
        self.again = self.query
        self.last = nn.Linear(16, 12)


HELD = {
    "MultiheadAttention.in_proj_weight": 3 * 16 * 16,
    "LSTM.weight_ih_l0": 4 * 8 * 16,
    "LSTM.weight_hh_l0": 4 * 8 * 8,
    "Own.query": 16 * 3 * 4,
}


def test_raw_matrices_are_counted_once_and_vectors_are_not() -> None:
    model = Own()
    assert uncovered(model, find_sites(model)) == HELD


def test_fused_experts_and_factored_layers() -> None:
    model = make("mixtral")
    with separate_parts(model):
        counts = uncovered(model, find_sites(model))
    assert counts == {"MixtralTopKRouter.weight": 2 * 4 * 32}
    small, report = lowrank.compress(model, 0.6, data=None)
    assert report.plan.settings["uncovered"] == counts
    assert uncovered(small, find_sites(small)) == counts
    plain = make("llama")
    assert uncovered(plain, find_sites(plain)) == {}


def test_plan_and_report_begin_with_what_they_are_about() -> None:
    model = Own()
    everything = sum(p.numel() for p in model.parameters())
    plan = lowrank.plan(model, 0.5, data=None)
    reached = 4 * 16 * 16 + 4 * 8 * 16 + 4 * 8 * 8  # attention and the recurrent net
    targets = f"targets: {reached:,} of {everything:,} parameters"
    outside = "in no layer that can be factored: 192 parameters, Own.query (192)"
    assert str(plan).splitlines()[:2] == [targets, outside]
    assert str(lowrank.Plan.from_json(plan.to_json())) == str(plan)
    _, report = lowrank.apply(model, plan)
    assert str(report).splitlines()[:2] == [targets, outside]
    assert str(lowrank.Report.from_json(report.to_json())) == str(report)


def test_without_any_there_is_one_line() -> None:
    plan = lowrank.plan(make("llama"), 0.5, data=None)
    assert str(plan).splitlines()[1].startswith("plan: ")
    assert told({}) == ""


def test_a_damaged_plan_is_one_error() -> None:
    plan = lowrank.plan(Own(), 0.5, data=None)
    text = plan.to_json().replace('"Own.query": 192', '"Own.query": "x"')
    with pytest.raises(LowrankError, match="uncovered must be an object of counts"):
        lowrank.Plan.from_json(text)
