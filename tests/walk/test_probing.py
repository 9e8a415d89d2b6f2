"""Layers of a subclass: taken where they compute what their base does, else refused by a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import lowrank
from lowrank.nn import LowRankLinear
from lowrank.walk import layouts
from lowrank.walk.probing import difference
from tests.zoo import FEED, SIZE, WORDS, tokens


def derived(base: type[nn.Module], forward: Any = None, **more: Any) -> Any:
    return type("Own", (base,), {**({"forward": forward} if forward else {}), **more})


def by_hand(self: Any, input: Tensor) -> Tensor:
    y = input @ self.weight.T
    return y if self.bias is None else y + self.bias


ALIKE = {
    "empty": lambda: derived(nn.Linear)(40, 60),
    "by hand": lambda: derived(nn.Linear, by_hand)(40, 60, bias=False),
    "another name": lambda: derived(nn.Linear, lambda self, hidden: by_hand(self, hidden))(40, 60),
    "of torch's attention": lambda: NonDynamicallyQuantizableLinear(40, 60),
    "half": lambda: derived(nn.Linear, by_hand)(40, 60, dtype=torch.float16),
    "table": lambda: derived(nn.Embedding)(30, 20, padding_idx=3),
    "bag": lambda: derived(nn.EmbeddingBag)(30, 20),
    "conv": lambda: derived(nn.Conv2d)(8, 6, 3, stride=2, padding=1),
    "conv in one dimension": lambda: derived(nn.Conv1d)(8, 6, 3, padding="same"),
}


def noisy(self: Any, input: Tensor) -> Tensor:
    return nn.functional.dropout(by_hand(self, input), 0.5, self.training)


def detached(self: Any, input: Tensor) -> Tensor:
    return by_hand(self, input).detach() + 0 * by_hand(self, input)


def asymmetric(self: Any, input: Tensor) -> Tensor:
    return nn.Conv2d.forward(self, nn.functional.pad(input, (0, input.shape[-1] % 2, 0, 0)))


def with_buffer() -> nn.Module:
    layer = derived(nn.Linear)(4, 6)
    layer.register_buffer("scale", torch.ones(()))
    return layer


ODD = {
    "scaled": (
        lambda: derived(nn.Linear, lambda s, input: 1.001 * by_hand(s, input)),
        "for random",
    ),
    "clipped": (
        lambda: derived(nn.Linear, lambda s, input: by_hand(s, input.clip(-9, 9))),
        "for r",
    ),
    "dropout": (lambda: derived(nn.Linear, noisy), "in training"),
    "no gradient": (lambda: derived(nn.Linear, detached), "for random"),
    "a rounded weight": (
        lambda: derived(
            nn.Linear, lambda s, input: nn.functional.linear(input, s.weight.round(), s.bias)
        ),
        "for random",
    ),
    "options": (lambda: derived(nn.Linear, lambda s, x, scale=1.0: by_hand(s, x)), "arguments"),
    "raises": (lambda: derived(nn.Linear, lambda s, input: s.missing), "could not be tried"),
    "calls": (lambda: derived(nn.Linear, __call__=lambda s, x: x), "overrides __call__"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_computes_the_same_is_taken(name: str) -> None:
    layer = ALIKE[name]()
    assert layouts.obstacle(layer) == ""
    assert layouts.obstacle(layer.to("meta")) == ""
    with torch.inference_mode():
        assert layouts.obstacle(ALIKE[name]()) == ""


@pytest.mark.parametrize("name", ODD)
def test_what_computes_something_else_is_refused(name: str) -> None:
    cls, words = ODD[name]
    assert words in layouts.obstacle(cls()(40, 60))


def test_other_tensors_and_sizes_of_the_input() -> None:
    assert "has scale beside the weight" in layouts.obstacle(with_buffer())
    conv = derived(nn.Conv2d, asymmetric)(8, 6, 3)
    assert "does not compute what its base nn.Conv2d" in layouts.obstacle(conv)


def test_the_layer_and_the_random_state_are_untouched() -> None:
    layer = derived(nn.Linear, noisy)(40, 60)
    layer.calls = 0
    held, state = dict(vars(layer)), torch.get_rng_state()
    weight = layer.weight.detach().clone()
    assert difference(layer, nn.Linear)
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(layer) == held
    assert torch.equal(layer.weight, weight)
    assert layer.weight.grad is None


def falcon() -> Any:
    import transformers as tf

    torch.manual_seed(0)
    sizes = {k: v for k, v in {**SIZE, **WORDS}.items() if k != "max_position_embeddings"}
    return tf.FalconForCausalLM(tf.FalconConfig(**sizes, bos_token_id=0, eos_token_id=1)).eval()


def test_falcon_is_compressed_saved_loaded_and_merged(tmp_path: Path) -> None:
    ids = tokens(2, 6)
    model, _ = lowrank.compress(falcon(), 0.6, data=[tokens(8, 16)], progress=False)
    parts = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(parts) == 8
    with torch.no_grad():
        want = model(input_ids=ids).logits
        lowrank.save(model, tmp_path)
        assert torch.equal(lowrank.from_pretrained(tmp_path)(input_ids=ids).logits, want)
        dense = lowrank.to_dense(model)
        torch.testing.assert_close(dense(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)


def test_scaled_embeddings_are_named_with_their_scale() -> None:
    import transformers as tf

    sizes = {**SIZE, **FEED, **WORDS, "num_key_value_heads": 2, "head_dim": 8}
    model = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**sizes)).eval()
    plan = lowrank.plan(model, 0.6, target_modules="all", data=None)
    reasons = {entry.name: entry.reason for entry in plan.entries}
    said = reasons["model.embed_tokens"]
    assert said.startswith("Gemma3TextScaledWordEmbedding multiplies what it reads by 5.657")
    assert sum(not reason for reason in reasons.values()) == 14


def test_the_output_of_torchs_attention() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 48, dropout=0.0, batch_first=True)
    small, _ = lowrank.compress(layer, 0.6, data=None)
    assert type(small.self_attn.out_proj) is LowRankLinear
    x = torch.randn(2, 5, 16)
    want = lowrank.to_dense(small, copy=True).train()(x)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            y = small.train(training)(x)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    small.train()(x)[..., 0].square().sum().backward()
    assert bool(small.self_attn.out_proj.down.weight.grad.any())
