"""Any decoder, encoder, or both: every effort, saved, loaded in a new process, used there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank
from lowrank import EFFORTS, Effort
from lowrank.calibration.running import forward
from lowrank.nn import LowRankLinear, PivotedLinear, TuckerConv

from .. import zoo

REPO = Path(__file__).parents[2]
FAMILIES = ("llama", "qwen3", "gpt2", "opt", "classifier", "t5", "vit")
BLOCKS = {kind: 4 if kind == "t5" else 2 for kind in FAMILIES}
WRITERS = {"llama", "qwen3", "gpt2", "opt", "t5"}
HOW = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
RATIO = 0.6


def quick(word: str) -> Effort:
    """The stages of a word, in few steps."""
    whole = EFFORTS[word].recovery
    few = {name: min(getattr(whole, name), 3) for name in ("block_steps", "distill_steps")}
    return replace(EFFORTS[word], recovery=replace(whole, **few))


def ids(rows: int, seed: int = 0, length: int = 10) -> torch.Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch_of(kind: str, rows: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the family's models are called with; padding where an encoder would have it."""
    if kind == "vit":
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    if kind == "t5":
        return {"input_ids": ids(rows, seed), "decoder_input_ids": ids(rows, seed + 50, 6)}
    if kind == "classifier":
        mask = torch.ones(rows, 10, dtype=torch.long)
        mask[::2, 7:] = 0
        return {"input_ids": ids(rows, seed), "attention_mask": mask}
    return {"input_ids": ids(rows, seed)}


def spread(kind: str) -> nn.Module:
    """Tiny and random, with weights large enough, and unlike enough, that outputs differ."""
    model = zoo.make(kind)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.2 / parameter.std().clamp(min=1e-3))
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def compressed(kind: str, word: str) -> tuple[nn.Module, nn.Module, lowrank.Report]:
    """The dense model, the compressed one and the report."""
    dense = spread(kind)
    with zoo.unchanged(dense):
        lean, report = lowrank.compress(
            dense, RATIO, data=[batch_of(kind, 20, s) for s in range(2)], effort=quick(word),
            copy=True, progress=False,
        )  # fmt: skip
    return dense, lean, report


EVERY = [(kind, word) for kind in FAMILIES for word in EFFORTS]
every = pytest.mark.parametrize(("kind", "word"), EVERY, ids=map("-".join, EVERY))


@pytest.mark.slow
@every
def test_every_family_at_every_effort(kind: str, word: str) -> None:
    dense, lean, report = compressed(kind, word)
    assert 0.5 * RATIO < report.achieved <= RATIO
    assert not any("left out" in note or "poorly" in note for note in report.notes)
    refitted = f"block refit: {{}} of {BLOCKS[kind]} blocks improved"
    said = [refitted.format(kept) in report.notes for kept in range(BLOCKS[kind] + 1)]
    assert any(said) == (word != "fast")
    assert any(n.startswith("distilled") for n in report.notes) == (word == "best")
    assert {type(lean.get_submodule(site.name)) for site in report.sites} <= {
        PivotedLinear, LowRankLinear, TuckerConv,
    }  # fmt: skip
    assert [type(p) for p in dense.modules()].count(PivotedLinear) == 0
    kept = [lowrank.kl(each, dense, [batch_of(kind, 20, 9)]) for each in (lean, other(kind))]
    assert kept[0] < 0.5 * kept[1]


@cache
def other(kind: str) -> nn.Module:
    """What the same shares out without data: plain SVD."""
    lean, _ = lowrank.compress(spread(kind), RATIO, data=None, copy=True, progress=False)
    return lean


@pytest.mark.slow
def test_all_are_the_same_in_a_new_process(tmp_path: Path) -> None:
    for kind, word in EVERY:
        _, lean, _ = compressed(kind, word)
        folder = tmp_path / f"{kind}-{word}"
        lean.save_pretrained(folder)
        torch.save(seen_of(kind, lean), folder / "seen.pt")
    found = in_new_process(tmp_path)
    assert found.keys() == {f"{kind}-{word}" for kind, word in EVERY}
    for name, outcome in found.items():
        kind = name.split("-")[0]
        assert outcome["keys"] == [[], []], name
        assert outcome["same weights"], name
        assert outcome["equal"], name
        assert outcome["factored"] == factored(compressed(*name.split("-"))[1]) > 0, name
        assert outcome.get("written", kind not in WRITERS), name


def seen_of(kind: str, lean: nn.Module) -> dict[str, Any]:
    """A batch with its logits, and for models that write, a continuation."""
    batch = batch_of(kind, 3, 77)
    with torch.no_grad():
        found: dict[str, Any] = {"batch": batch, "logits": forward(lean, batch).logits}
        found["weights"] = dict(lean.state_dict())
        if kind in WRITERS:
            found["prompt"], found["how"] = {"input_ids": ids(2, 78, 4)}, HOW
            found["written"] = lean.generate(**found["prompt"], **HOW)
            assert found["written"].shape[1] >= HOW["max_new_tokens"]
    assert found["logits"].std() > 0.01
    return found


def factored(model: nn.Module) -> int:
    return sum(type(part).__module__.startswith("lowrank.") for part in model.modules())


def in_new_process(folder: Path) -> dict[str, dict[str, Any]]:
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("afterwards.py"))
    done = subprocess.run(
        [sys.executable, script, str(folder)],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("word", EFFORTS)
def test_the_words_themselves(word: str) -> None:
    """With all the steps that they stand for: each is worth what it adds, on held-out rows."""
    dense = spread("llama")
    lean, report = lowrank.compress(
        dense, RATIO, data=[batch_of("llama", 20, s) for s in range(2)], effort=word, copy=True,
        progress=False,
    )  # fmt: skip
    steps = (EFFORTS[word].recovery.block_steps, EFFORTS[word].recovery.distill_steps)
    assert (steps[0] > 0, steps[1] > 0) == (word != "fast", word == "best")
    assert any("blocks improved" in note for note in report.notes) == (steps[0] > 0)
    assert any(f"of {steps[1]})" in note for note in report.notes) == (steps[1] > 0)
    assert report.plan.settings["recovery"] == EFFORTS[word].recovery.to_json()
    fresh = [batch_of("llama", 20, 9)]
    assert lowrank.kl(lean, dense, fresh) < 0.5 * lowrank.kl(other("llama"), dense, fresh)
