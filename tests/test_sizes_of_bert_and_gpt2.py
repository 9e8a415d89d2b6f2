"""Greenformer's published sizes of BERT-base and GPT-2, to the digit, without any weights.

The models are built on the meta device. `plan` refuses such a model, for it has nothing to
decompose; but the size of a plan with fixed ranks does not depend on the weights. So the ranks that
Greenformer's own rule gives are written as a `rank_pattern`, the same code as in `compress` checks
it and reads it, empty layers are put in place, and what is there is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lowrank.api.request import Request
from lowrank.nn import build
from lowrank.plans.entry import check_rank
from lowrank.walk import layouts
from lowrank.walk.sites import check_rank_pattern, find_sites, pattern_value, select_sites
from lowrank.walk.surgery import put


def bert() -> Any:
    import transformers as tf

    return tf.BertModel(tf.BertConfig())


def gpt2() -> Any:
    import transformers as tf

    return tf.GPT2LMHeadModel(tf.GPT2Config())


def empty(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        model = make()
    model.tie_weights()
    return model


def rank_by_greenformer(shape: tuple[int, int], rank: int | float) -> int | None:
    """Its rule for a linear layer: a fraction is one of r_max; None where it skips the layer."""
    out_features, in_features = shape
    most = int(in_features * out_features / (in_features + out_features))
    wanted = int(most * rank) if rank < 1 else int(rank)
    return None if wanted == 0 or most <= wanted else wanted


def pattern_of(model: nn.Module, rank: int | float) -> dict[str, int]:
    """Its walk never factors a child of the root; GPT-2's head is one (and tied besides)."""
    linear = [site for site in find_sites(model) if site.kind == "linear"]
    inner = [site for site in linear if "." in site.name]
    ranks = {site.name: rank_by_greenformer(site.shape, rank) for site in inner}
    return {name.replace(".", r"\."): found for name, found in ranks.items() if found}


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def factored_by(model: Any, pattern: dict[str, int]) -> Any:
    """Empty factors wherever the pattern says so."""
    sites = select_sites(find_sites(model), model)
    patterns = Request(rank_pattern=pattern).rank_pattern or {}
    check_rank_pattern(patterns, sites)
    for site in sites:
        key = pattern_value(patterns, site.names)
        if key is None:
            continue
        check_rank(site.title, site.shape, patterns[key])
        out_features, in_features = site.shape
        spec = {
            "type": "LowRankLinear", "in_features": in_features, "out_features": out_features,
            "rank": patterns[key], "bias": layouts.bias(site.module) is not None,
        }  # fmt: skip
        model = put(model, site, build(spec, site.name))
    return model


@pytest.mark.parametrize(
    ("make", "dense", "rank", "layers", "published"),
    [
        (bert, 109_482_240, 256, 73, 66_818_304),
        (bert, 109_482_240, 0.4, 73, 58_052_352),
        (gpt2, 124_439_808, 256, 48, 77_253_888),
        (gpt2, 124_439_808, 0.4, 48, 73_383_168),
    ],
)
def test_the_published_size_to_the_digit(
    make: Callable[[], Any], dense: int, rank: float, layers: int, published: int
) -> None:
    model = empty(make)
    assert numbers(model) == dense
    pattern = pattern_of(model, rank)
    assert len(pattern) == layers
    model = factored_by(model, pattern)
    assert numbers(model) == published
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("shape", "most"),
    [((768, 768), 384), ((3072, 768), 614), ((4096, 4096), 2048), ((64, 64), 32)],
)
def test_the_rule_skips_from_its_largest_rank_on(shape: tuple[int, int], most: int) -> None:
    assert rank_by_greenformer(shape, most - 1) == most - 1
    assert rank_by_greenformer(shape, most) is None
    assert rank_by_greenformer(shape, 0.001) in (None, most // 1000)
    assert rank_by_greenformer(shape, 0.5) == most // 2


def test_the_same_pattern_on_real_weights_gives_the_same_size() -> None:
    """What is counted here is what `compress` stores: on a small model it can be run."""
    import lowrank
    from tests.zoo import make

    pattern = pattern_of(make("gpt2"), 0.5)
    small, _ = lowrank.compress(make("gpt2"), rank_pattern=pattern, data=None, progress=False)
    assert numbers(factored_by(make("gpt2"), pattern)) == numbers(small)
