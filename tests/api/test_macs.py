"""A budget of products: convolutions count at all of their positions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank.plans.plan import Plan

from ..nets import images, small_net


def products(net: nn.Module, targets: set[str]) -> int:
    """Counted by hooks on what is really multiplied, for one image, inside the targets."""
    found: list[int] = []

    def hook(module: Any, _inputs: object, output: torch.Tensor) -> None:
        found.append(module.weight.numel() * (output[0].numel() // output.shape[1]))

    handles = [
        part.register_forward_hook(hook)
        for name, part in net.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
        and any(name == t or name.startswith(f"{t}.") for t in targets)
    ]
    with torch.no_grad():
        net(images(1))
    for handle in handles:
        handle.remove()
    return sum(found)


@pytest.mark.parametrize("policy", ["uniform", "spectrum"])
def test_the_ratio_is_that_of_the_products_that_are_made(policy: str) -> None:
    net, data = small_net(), [images(32)]
    lean, report = lowrank.compress(
        net, 0.6, unit="macs", policy=policy, data=data, copy=True, progress=False
    )
    targets = {e.name for e in report.plan.entries if e.target}
    kept = products(lean, targets) / products(net, targets)
    assert report.achieved == pytest.approx(kept, rel=1e-9)
    assert kept <= 0.6
    by_name = {e.name: e for e in report.plan.entries}
    assert by_name["stage1.0.conv1"].repeats == 144
    assert by_name["stage2.0.conv1"].repeats == 36
    assert by_name["head"].repeats == 1


def test_plans_keep_it_and_edits_count_so() -> None:
    net, data = small_net(), [images(32)]
    plan = lowrank.plan(net, 0.6, unit="macs", method="svd", data=data, progress=False)
    again = Plan.from_json(plan.to_json())
    assert again.entries == plan.entries
    edited = plan.edit({"stage1.0.conv1": 3})
    entry = next(e for e in edited.entries if e.name == "stage1.0.conv1")
    assert entry.cost.macs == 144 * 3 * (8 + 72)
    body = json.loads(plan.to_json())
    body["entries"][0]["repeats"] = 0
    with pytest.raises(lowrank.LowrankError, match="repeats"):
        Plan.from_json(json.dumps(body))


def test_other_units_and_no_data_count_each_layer_once() -> None:
    net = small_net()
    for options in ({"data": [images(32)]}, {"unit": "macs", "data": None}):
        plan = lowrank.plan(net, 0.6, progress=False, **options)
        assert {e.repeats for e in plan.entries} == {1}
