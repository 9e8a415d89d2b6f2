"""What is no module is one sentence; inference mode leaves no mark on what is made in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError
from tests.zoo import make, mlp, tokens

DATA = [tokens(8, 16)]


@pytest.mark.parametrize(
    "options", [{"data": None}, {"data": DATA}, {"data": DATA, "effort": "fast"}]
)
def test_what_inference_mode_compresses_can_be_trained(options: dict[str, Any]) -> None:
    model = make("llama")
    with torch.inference_mode():
        model, _ = lowrank.compress(model, 0.6, progress=False, **options)
        assert torch.is_inference_mode_enabled()
    assert not any(p.is_inference() for p in model.parameters())
    model(input_ids=tokens()).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_so_can_what_the_other_verbs_make() -> None:
    plan = lowrank.plan(make("llama"), 0.6, data=None)
    model = make("llama")
    with torch.inference_mode():
        calibration = lowrank.calibrate(model, DATA, progress=False)
        model, _ = lowrank.apply(model, plan, copy=True)
        dense = lowrank.to_dense(model, copy=True)
    for made in (model, dense, lowrank.compress(make("llama"), 0.6, data=calibration)[0]):
        assert not any(p.is_inference() for p in made.parameters())
        made(input_ids=tokens()).logits.square().sum().backward()


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = mlp(24, 40, 16)
    with pytest.raises(LowrankError, match=r"4 parameters were made in torch\.inference_mode"):
        lowrank.compress(model, 0.6, data=None)


class Pipeline:
    def __init__(self) -> None:
        self.model = mlp(24, 40, 16)


CALLS: dict[str, Callable[[Any, Path], object]] = {
    "compress": lambda m, _: lowrank.compress(m, 0.5),
    "copy": lambda m, _: lowrank.compress(m, 0.5, copy=True),
    "plan": lambda m, _: lowrank.plan(m, 0.5),
    "to_dense": lambda m, _: lowrank.to_dense(m),
    "save": lambda m, path: lowrank.save(m, path / "out"),
    "perplexity": lambda m, _: lowrank.perplexity(m, str.split, "a text"),
    "inspect": lambda m, _: lowrank.inspect(m),
    "calibrate": lambda m, _: lowrank.calibrate(m, DATA),
}


@pytest.mark.parametrize("verb", CALLS)
def test_a_pipeline_is_told_where_its_model_is(verb: str, tmp_path: Path) -> None:
    with pytest.raises(LowrankError, match=r"got Pipeline: pass its \.model"):
        CALLS[verb](Pipeline(), tmp_path)
    with pytest.raises(LowrankError, match=r"expected a torch\.nn\.Module, got str"):
        CALLS[verb]("model", tmp_path)


@pytest.mark.parametrize(
    ("tokenizer", "text"), [(str.split, ["a", "b"]), (None, "a"), (str.split, 3)]
)
def test_perplexity_of_what_is_no_text(tokenizer: Any, text: Any) -> None:
    with pytest.raises(LowrankError, match=r"perplexity takes a tokenizer and one text, got"):
        lowrank.perplexity(make("llama"), tokenizer, text)


def test_factors_in_int8_are_not_merged_as_numbers() -> None:
    model, _ = lowrank.compress(mlp(24, 40, 16), 0.6, data=None)
    up = model[0].up
    up.weight = nn.Parameter((up.weight.detach() * 50).to(torch.int8), requires_grad=False)
    with pytest.raises(LowrankError, match=r"0 holds codes .*up\.weight torch\.int8; merge it bef"):
        lowrank.to_dense(model)
