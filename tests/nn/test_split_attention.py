"""Attention from layers against torch's own, in every way of calling it."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank.nn.splits import split_module

CAUSAL = torch.triu(torch.full((5, 7), -torch.inf), 1)
MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": True},
    "additive": {"attn_mask": torch.randn(5, 7)},
    "boolean, each head": {"attn_mask": torch.rand(12, 5, 7) > 0.7, "average_attn_weights": False},
    "padding and additive": {"key_padding_mask": True, "attn_mask": torch.randn(5, 7)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "padding and causal": {"key_padding_mask": True, "attn_mask": CAUSAL, "is_causal": True},
}


def _pair(**options: Any) -> tuple[nn.MultiheadAttention, nn.Module]:
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(12, 4, **options).eval()
    for name, parameter in whole.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    split = copy.deepcopy(whole)
    split_module(split)
    return whole, split


def _equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 14}, {"bias": False}])
def test_equals_torch(masks: str, weights: bool, widths: dict[str, Any]) -> None:
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    for first, extra, zero in itertools.product((False, True), repeat=3):
        whole, split = _pair(batch_first=first, add_bias_kv=extra, add_zero_attn=zero, **widths)
        q, k, v = (
            torch.randn(3, 5, 12),
            torch.randn(3, 7, whole.kdim),
            torch.randn(3, 7, whole.vdim),
        )
        given: list[Tensor] = [q, k, v] if first else [x.transpose(0, 1) for x in (q, k, v)]
        options = {**MASKS[masks], "need_weights": weights}
        if "key_padding_mask" in options:
            options["key_padding_mask"] = padding
        if options.get("is_causal") and (extra or zero) and "key_padding_mask" not in options:
            continue  # torch leaves out the extra keys there, with need_weights or without
        _equal(split(*given, **options), whole(*given, **options))


def test_without_a_batch() -> None:
    whole, split = _pair()
    q, k = torch.randn(5, 12), torch.randn(7, 12)
    padding = torch.arange(7) > 4
    for options in ({}, {"key_padding_mask": padding}, {"need_weights": False}):
        _equal(split(q, k, k, **options), whole(q, k, k, **options))


def test_a_causal_hint_needs_a_mask_as_in_torch() -> None:
    q = torch.randn(3, 5, 12)
    for attention in _pair():
        with pytest.raises(RuntimeError, match="attn_mask"):
            attention(q, q, q, is_causal=True)


def test_dropout_and_gradients_in_training() -> None:
    _, split = _pair(dropout=0.5)
    q = torch.randn(3, 5, 12)
    split.train()
    one, other = split(q, q, q)[0], split(q, q, q)[0]
    assert not torch.equal(one, other)
    one.sum().backward()
    assert all(p.grad is not None for p in split.parameters())


def test_fused_kernels_of_encoder_layers_pass_over_it() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padding = torch.randn(3, 7, 12), torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    expected = encoder(x, src_key_padding_mask=padding)
    calls: list[int] = []
    for part in encoder.layers:
        split_module(part.self_attn)
        part.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = encoder(x, src_key_padding_mask=padding)
    assert len(calls) == 2
    seen = ~padding
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-5)
