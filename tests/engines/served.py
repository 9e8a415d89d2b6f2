"""Models in every form that an engine serves, each with the tokens that transformers writes.

    python -m tests.engines.served FOLDER [MODEL TEXT]

Without MODEL: the package's own, and two that are not trained. What the engine's own environment
reads holds numbers alone: `tokens.json` beside each model.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import lowrank
from lowrank import demo

NEW = 40  # tokens to write
PROMPTS = ("Return a list of", "def __init__(self,")
ROWS, LENGTH = 32, 128
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
FORMS: dict[str, dict[str, Any]] = {
    "plain-factors": {"ratio": 0.6, "method": "whitened"},
    "pivoted-factors": {"ratio": 0.8, "method": "whitened", "storage": "pivoted"},
    "pivoted-and-dense-layers": {
        "ratio": 0.8, "method": "whitened", "storage": "pivoted", "policy": "energy",
        "exclude_modules": ["k_proj", "gate_proj"],
    },
    "factors-and-dense-layers": {
        "ratio": 0.6, "method": "whitened", "exclude_modules": ["v_proj", "up_proj"],
    },
    "shared-bases": {"ratio": 0.6, "method": "basis-sharing"},
}  # fmt: skip


def forms_of(model: Any, tokenizer: Any, text: str) -> Iterator[tuple[str, Any]]:
    """A language model, dense and compressed in every form that is served."""
    yield "dense", model
    ids = tokenizer(text, verbose=False)["input_ids"][: ROWS * LENGTH]
    data = torch.tensor(ids).view(-1, LENGTH)
    for name, options in FORMS.items():
        yield name, lowrank.compress(copy.deepcopy(model), data=data, progress=False, **options)[0]


def untrained(words: int) -> Iterator[tuple[str, Any]]:
    """Biases of queries, keys and values; and their weights in one matrix of the checkpoint."""
    from transformers import Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=words, **SIZES, **HEADS)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    yield "biases", lowrank.compress(model, 0.6, progress=False)[0]
    config = Phi3Config(vocab_size=words, pad_token_id=0, **SIZES, **HEADS)
    fused = Phi3ForCausalLM(config).eval()
    yield (
        "fused-in-the-checkpoint",
        lowrank.compress(fused, 0.6, storage="pivoted", progress=False)[0],
    )


def models(source: str | None, text: str | None) -> tuple[Any, Iterator[tuple[str, Any]]]:
    """The tokenizer of all, and the models by name."""
    if source is None or text is None:
        tiny = demo.tiny_lm()

        def every() -> Iterator[tuple[str, Any]]:
            yield from forms_of(tiny.model, tiny.tokenizer, tiny.calibration)
            yield from untrained(tiny.model.config.vocab_size)

        return tiny.tokenizer, every()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    return tokenizer, forms_of(model, tokenizer, Path(text).read_text(encoding="utf-8"))


def write(folder: Path, source: str | None = None, text: str | None = None) -> None:
    """One model after the other."""
    tokenizer, every = models(source, text)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for name, model in every:
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        found = {"prompts": prompts, "tokens": [written(model, ids) for ids in prompts]}
        (folder / name / "tokens.json").write_text(json.dumps(found))
        print(folder / name, flush=True)


def written(model: Any, ids: list[int]) -> list[int]:
    """The greedy continuation."""
    with torch.no_grad():
        found = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
    return [int(token) for token in found[0, len(ids) :]]


if __name__ == "__main__":
    write(Path(sys.argv[1]), *sys.argv[2:])
