"""Greenformer's published sizes of VGG16, to the digit: convolutions count with its own rule.

As in test_golden_counts.py: empty layers on the meta device in place of those that its rule
factors, and what is there is counted. VGG16 (Simonyan and Zisserman, arXiv 1409.1556, table 1 D)
is built by hand.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank.nn import ChannelConv, Geometry, LowRankLinear, build
from lowrank.walk import layouts
from lowrank.walk.sites import find_sites
from lowrank.walk.surgery import put
from tests.test_sizes_of_bert_and_gpt2 import numbers, rank_by_greenformer

WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def vgg16() -> nn.Module:
    """1000 classes, images (B, 3, 224, 224); 0 stands for pooling."""
    features: list[nn.Module] = []
    before = 3
    for width in WIDTHS:
        if not width:
            features.append(nn.MaxPool2d(2))
            continue
        features += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        before = width
    head = nn.Sequential(
        nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, 1000),
    )  # fmt: skip
    return nn.ModuleDict({"features": nn.Sequential(*features), "classifier": head})


def factored_by(model: nn.Module, rank: int | float) -> tuple[nn.Module, int]:
    """Its rule reads channels alone, of a convolution too: the kernel is not counted."""
    count = 0
    for site in find_sites(model):
        module = site.module
        if isinstance(module, nn.Conv2d):
            found = rank_by_greenformer((module.out_channels, module.in_channels), rank)
            geometry = Geometry.of(module)
            spec = {"type": "ChannelConv", **geometry.spec(), "rank": found, "bias": True}
            spec["wide"] = "first"
        else:
            found = rank_by_greenformer(site.shape, rank)
            spec = {
                "type": "LowRankLinear", "in_features": site.shape[1],
                "out_features": site.shape[0], "rank": found, "bias": True,
            }  # fmt: skip
        if found:
            assert layouts.bias(module) is not None
            model = put(model, site, build(spec, site.name))
            count += 1
    return model, count


@pytest.mark.parametrize(
    ("rank", "layers", "published"), [(256, 3, 25_596_712), (0.4, 15, 52_613_904)]
)
def test_the_published_size_to_the_digit(rank: float, layers: int, published: int) -> None:
    with torch.device("meta"):
        model = vgg16()
    assert numbers(model) == 138_357_544
    model, count = factored_by(model, rank)
    assert numbers(model) == published
    assert count == layers
    factored = [m for m in model.modules() if isinstance(m, ChannelConv | LowRankLinear)]
    assert all(p.is_meta for m in factored for p in m.parameters())
