"""Efforts on what they cannot work with: one error, or a result whose report says what is amiss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lowrank
from lowrank import EFFORTS, Effort, LowrankError, Recovery

from .. import zoo

CLOSED = {"method": "whitened", "policy": "uniform", "effort": Recovery()}


def quick(word: str) -> Effort:
    """The stages of a word, in few steps."""
    whole = EFFORTS[word].recovery
    few = {name: min(getattr(whole, name), 2) for name in ("block_steps", "distill_steps")}
    return replace(EFFORTS[word], recovery=replace(whole, **few))


every_word = pytest.mark.parametrize("word", EFFORTS)


def compressed(
    model: nn.Module, data: Any, word: str, **more: Any
) -> tuple[nn.Module, tuple[str, ...]]:
    with zoo.unchanged(model):
        lean, report = lowrank.compress(
            model, 0.6, data=data, effort=quick(word), copy=True, progress=False, **more
        )
    assert all(bool(p.isfinite().all()) for p in lean.parameters())
    return lean, report.notes


# Data that teaches nothing


@every_word
def test_embeddings_of_zeros(word: str) -> None:
    """Nothing shows what to keep: neither is the model cut to nothing, nor a reason withheld."""
    model = zoo.make("llama")
    nn.init.zeros_(model.model.embed_tokens.weight)
    with pytest.raises(LowrankError, match="all 14 targets read nothing but zeros in the data: "):
        compressed(model, zoo.tokens(10, 12), word)
    lean, _ = compressed(model, zoo.tokens(10, 12), word, on_missing="data-free")
    assert bool(lean(input_ids=zoo.tokens()).logits.isfinite().all())


@every_word
def test_inputs_of_zeros(word: str) -> None:
    """Biases make something of nothing: only the first layer reads zeros."""
    model = zoo.mlp(24, 16, 16, 12)
    lean, notes = compressed(model, torch.zeros(64, 24), word)
    said = "1 layers with 384 parameters read nothing but zeros in the data and stay dense, "
    assert any(note.startswith(said) for note in notes)
    assert type(lean[0]) is nn.Linear


@every_word
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "classifier"])
@pytest.mark.parametrize("what", ["one token", "one sequence"])
def test_singular_grams(kind: str, what: str, word: str) -> None:
    """Directions that the data does not show are not blown up."""
    model = zoo.make(kind)
    data = zoo.tokens(1, 1) if what == "one token" else zoo.tokens(1, 6).repeat(24, 1)
    even = {} if word == "fast" else {"policy": "uniform"}  # one allocation shows the stages
    lean, notes = compressed(model, data, word, **even)
    assert any("fewer distinct inputs than they have features" in note for note in notes)
    fresh = zoo.tokens(4, 9, start=3)
    far = lowrank.kl(lean, model, fresh)
    plain, _ = lowrank.compress(model, 0.2, data=None, copy=True, progress=False)
    assert 0 < far < 5 * lowrank.kl(plain, model, fresh)


def test_data_enough_gets_no_such_note() -> None:
    _, notes = compressed(zoo.make("llama"), zoo.tokens(10, 12), "fast")
    assert not any("poorly" in note or "zeros" in note for note in notes)


# Numbers that are not finite


@every_word
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 3e4), (torch.float32, 1e15)])
def test_activations_that_overflow(dtype: torch.dtype, factor: float, word: str) -> None:
    """In float16 themselves, in float32 their squares; the weights are finite."""
    model = zoo.make("llama").to(dtype)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight.mul_(factor)
        mlp.gate_proj.weight.mul_(factor)
    assert bool(mlp.up_proj.weight.isfinite().all())
    message = zoo.refused(model, 0.6, data=zoo.tokens(8), effort=quick(word))
    assert message.startswith(
        "model.layers.1.mlp.down_proj: its input holds NaN or Inf, or numbers"
    )
    assert "float16 overflows where float32 and bfloat16 do not" in message


@every_word
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_alone_are_no_trouble(dtype: torch.dtype, word: str) -> None:
    lean, _ = compressed(zoo.make("llama").to(dtype), zoo.tokens(8), word)
    assert {p.dtype for p in lean.parameters()} == {dtype}


@every_word
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_nan_in_the_weights_of_one_block(kind: str, word: str) -> None:
    model = zoo.make(kind)
    name = {
        "llama": "model.layers.1.mlp.up_proj",
        "t5": "decoder.block.1.layer.2.DenseReluDense.wi",
    }
    with torch.no_grad():
        model.get_submodule(name[kind]).weight[2, 3] = math.nan
    message = zoo.refused(model, 0.6, data=[zoo.example(kind)], effort=quick(word))
    assert message.startswith(f"{name[kind]}: the weight holds NaN or Inf: load the model again")


@every_word
def test_a_nan_in_the_activations_of_one_block(word: str) -> None:
    model = zoo.make("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _args, out: out * math.nan)
    message = zoo.refused(model, 0.6, data=zoo.tokens(8), effort=quick(word))
    assert message.startswith("model.layers.1.self_attn.q_proj: its input holds NaN or Inf")
    assert "check the data and the layers before it" in message


@every_word
def test_a_nan_in_the_head_alone(word: str) -> None:
    model = zoo.make("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    message = zoo.refused(model, 0.6, data=zoo.tokens(8), effort=quick(word))
    assert message.startswith("the model's logits hold NaN or Inf: check its last layers")


@pytest.mark.parametrize(
    "how", [CLOSED, {**CLOSED, "policy": "lossaware"}, {"effort": "fast"}], ids=str
)
def test_a_nan_in_a_row_that_is_held_out(how: dict[str, Any]) -> None:
    """No statistic sees it, and every judgement would."""
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[-1, 0, 0, 0] = math.nan
    message = zoo.refused(zoo.make("vit"), 0.6, data=[{"pixel_values": images}], **how)
    assert message.startswith("the dense model's predictions on held-out rows hold NaN or Inf")


def fragile(last: bool) -> nn.Module:
    """Two layers; what is not exactly the dense first one's output becomes NaN, or the last's."""
    first, second = nn.Linear(16, 24), nn.Linear(24, 16)
    kept = [part.weight.detach().clone() for part in (first, second)]

    def call(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y if last or same(y, x, kept[0], first.bias) else y * math.nan)
        return z if not last or same(z, y, kept[1], second.bias) else z * math.nan

    return zoo.Custom(call, first=first, second=second)


def same(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return torch.equal(y, functional.linear(x, weight, bias))


def test_activations_of_the_compressed_model_alone() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    message = zoo.refused(fragile(last=False), 0.6, data=list(x.split(8)), **CLOSED)
    assert message.startswith("second: its input holds NaN or Inf in the compressed model, but not")
    message = zoo.refused(fragile(last=True), 0.6, data=list(x.split(8)), **CLOSED)
    assert message.startswith("the compressed model's predictions on held-out rows hold NaN or Inf")
    trained = {**CLOSED, "effort": Recovery(distill_steps=2)}
    message = zoo.refused(fragile(last=True), 0.6, data=list(x.split(8)), **trained)
    assert message.startswith("recovery cannot start: the loss of the compressed model is NaN")


def test_outputs_of_one_compressed_block_alone() -> None:
    """Nothing inside the block reads what is broken; its own refit meets it first."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(fragile(last=True), nn.Linear(16, 16))
    how = {**CLOSED, "effort": Recovery(block_steps=2)}
    message = zoo.refused(model, 0.6, data=list(x.split(8)), **how)
    assert message.startswith("0: recovery cannot start: the loss of the compressed model is NaN")
    assert message.endswith("run it in float32 or bfloat16")


# Models of another build


class Bare(nn.Module):
    """No container, and hence no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@every_word
def test_a_model_without_blocks(word: str) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    model = Bare()
    lean, notes = compressed(model, list(x.split(8)), word)
    left_out = "the model has no chain of blocks: block refit was skipped"
    assert (left_out in notes) == (word != "fast")
    assert any(note.startswith("distilled") for note in notes) == (word == "best")
    assert lowrank.kl(lean, model, [x]) < 0.1


@every_word
def test_a_model_without_predictions(word: str) -> None:
    """The Fisher has nothing to draw from; what does without it works, and says what it lacked."""
    bert = zoo.make("classifier").bert
    model = zoo.Custom(lambda self, x: {"states": self.bert(x)[0].tolist()}, bert=bert)
    data = zoo.tokens(10, 12)
    message = zoo.refused(model, 0.6, data=data, effort=quick(word))
    assert message.startswith("the Fisher needs the model's predictions: expected logits")
    assert "method='whitened' with policy='uniform' does not" in message
    message = zoo.refused(model, 0.6, data=data, effort=quick(word), method="whitened")
    assert message.endswith("policy='uniform' does not compare")
    recovery = quick("balanced").recovery
    _, report = lowrank.compress(
        model, 0.6, data=data, progress=False, **{**CLOSED, "effort": recovery}
    )
    assert any("of 2 blocks improved" in note for note in report.notes)
    assert any(note.startswith("recovery could not be judged") for note in report.notes)


@every_word
def test_an_encoder_without_a_head_is_judged_by_its_hidden_states(word: str) -> None:
    model, data = zoo.make("classifier").bert, zoo.tokens(24, 12)
    lean, notes = compressed(model, data, word)
    assert any("held-out" in note and "relative squared error" in note for note in notes)
    plain, _ = lowrank.compress(model, 0.6, data=data, policy="uniform", copy=True, progress=False)
    fresh = zoo.tokens(8, 12, start=5)
    with torch.no_grad():
        dense, near, far = (m.eval()(fresh).last_hidden_state for m in (model, lean, plain))
    assert (near - dense).norm() < (far - dense).norm()


@pytest.mark.parametrize("form", ["vectors", "padded"])
def test_data_of_other_forms(form: str) -> None:
    """Vectors without an axis of rows, and rows that are padded and classified as a whole."""
    if form == "vectors":
        x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
        compressed(Bare(), list(x), "best")
        return
    mask = torch.ones(12, 10, dtype=torch.long)
    mask[::2, 6:] = 0
    data = {"input_ids": zoo.tokens(12, 10), "attention_mask": mask}
    _, notes = compressed(zoo.make("classifier"), data, "best")
    assert any("of 2 blocks improved" in note for note in notes)
