"""The embedded model: it is what its card says, and hard enough to tell methods apart."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

import lowrank
from lowrank.demo import LENGTH, TinyLM, tiny_lm

FOLDER = files("lowrank") / "tiny_lm"


@pytest.fixture(scope="module")
def tiny() -> TinyLM:
    return tiny_lm()


def test_the_card_speaks_of_this_model(tiny: TinyLM) -> None:
    made = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert made["parameters"] == tiny.model.num_parameters()
    assert made["tokens_seen"] >= 60 * made["parameters"]
    assert 600_000 <= made["parameters"] <= 1_500_000
    assert f"{made['parameters']:,}" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_texts_are_apart_and_small_enough(tiny: TinyLM) -> None:
    made = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert not set(made["held_out"]) & set(made["calibration"])
    assert len(tiny.held_out.encode()) <= 200_000
    assert tiny.held_out[:2000] not in tiny.calibration


def test_it_is_hard_to_compress_and_data_helps(tiny: TinyLM) -> None:
    text = tiny.held_out[:12_000]
    seen = lowrank.calibrate(
        tiny.model, tiny.calibration[:30_000], tokenizer=tiny.tokenizer, progress=False
    )
    found = {}
    for method in ("svd", "whitened"):
        small, _ = lowrank.compress(
            tiny.model, 0.8, method=method, data=seen, copy=True, progress=False
        )
        found[method] = lowrank.kl(small, tiny.model, text, tokenizer=tiny.tokenizer, length=LENGTH)
    assert found["svd"] >= 0.5  # an easy model would show nothing
    assert found["whitened"] < found["svd"]
