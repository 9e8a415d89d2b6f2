"""An outline, found without running the model, against what runs of it show."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from lowrank.calibration.observation import observe
from lowrank.calibration.outline import outlined
from lowrank.walk.sites import find_sites
from tests.zoo import make, mlp, tokens

LENGTH = 16


def layers_of(model: nn.Module) -> list:
    return [site for site in find_sites(model) if site.kind != "embedding"]


def test_groups_tokens_and_blocks_are_those_of_a_run() -> None:
    for kind in ("llama", "gpt2", "bert"):
        model = make(kind)
        sites = layers_of(model)
        seen = observe(model, sites, lambda model=model: model(tokens(1, LENGTH)))
        outline = outlined(model, sites, LENGTH)
        assert outline.traced
        assert set(outline.groups) == set(seen.groups), kind
        (chain,) = [chain for chain in seen.chains if len(chain) > 1]
        assert tuple(outline.blocks) == chain
        shapes = {name: math.prod(shape[:-1]) for name, shape in seen.shapes.items()}
        assert outline.tokens == shapes


def test_flops_are_those_of_the_formula() -> None:
    """Two for every weight and token, and both products of attention, all pairs of tokens."""
    model = make("llama")
    config = model.config
    outline = outlined(model, layers_of(model), LENGTH)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    heads = config.num_attention_heads * config.head_dim
    attention = 4 * LENGTH**2 * heads * config.num_hidden_layers
    assert outline.flops - 2 * LENGTH * weights - attention in range(LENGTH * config.head_dim + 1)
    head = 2 * LENGTH * model.lm_head.weight.numel()
    inside = sum(outline.blocks.values())
    assert outline.flops - head - inside in range(LENGTH * config.head_dim + 1)  # the positions
    assert outline.hidden == LENGTH * config.hidden_size
    assert outline.predictions == LENGTH * config.vocab_size


def test_no_weight_is_needed_or_touched() -> None:
    model = make("llama")
    before = copy.deepcopy(model.state_dict())
    outline = outlined(model, layers_of(model), LENGTH)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.device("meta"):
        empty = type(model)(model.config).eval()
    assert outlined(empty, layers_of(empty), LENGTH) == outline


def test_an_encoder_decoder_is_followed() -> None:
    model = make("t5")
    sites = layers_of(model)
    outline = outlined(model, sites, LENGTH)
    assert outline.traced
    assert set(outline.tokens) == {site.name for site in sites}


def test_a_model_that_reads_no_ids_is_described_by_its_layers() -> None:
    model = mlp(24, 40, 24)
    outline = outlined(model, layers_of(model), 5)
    assert not outline.traced
    assert outline.flops == 2 * 5 * (24 * 40 + 40 * 24)
    assert outline.groups == (("0",), ("2",))
    assert outline.tokens == {"0": 5, "2": 5}
    assert sum(outline.blocks.values()) == outline.flops
