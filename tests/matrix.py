"""Architectures × stored forms × tools: `make matrix`.

Tiny random models of ten architectures, compressed to 0.6 in each form that they can have, go
through everything in `tests/tools.py`, and through FSDP2 in two processes. A cell is "yes", or one
reason; anything else is a fault. The result goes to `benchmarks/results/matrix.json` and
`docs/matrix.md`; `tests/test_matrix.py` runs some of the cells in every check.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lowrank
from lowrank.walk.surgery import factored
from tests import zoo
from tests.limits import TooLong, limited
from tests.processes import in_processes
from tests.tools import TOOLS, Case, tried

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/matrix.json"
PAGE = ROOT / "docs/matrix.md"
RATIO, SECONDS = 0.6, 120
SHARDED = "FSDP2"
COLUMNS = [*TOOLS, SHARDED]
WIDTH, VOCABULARY = zoo.WIDTH, zoo.VOCABULARY


@dataclass
class Architecture:
    """How to make a tiny model and what it reads; `writes`: it generates text."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], dict[str, Tensor]]
    labels: Callable[[Any], Tensor]
    writes: bool = False


def ids(rows: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, 8), generator=draw)


def text(rows: int, seed: int) -> dict[str, Tensor]:
    return {"input_ids": ids(rows, seed)}


def text_twice(rows: int, seed: int) -> dict[str, Tensor]:
    return {"input_ids": ids(rows, seed), "decoder_input_ids": ids(rows, seed + 100)[:, :5]}


def picture(rows: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=draw)}


def sound(rows: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 8, 32, generator=draw)
    return {"input_features": features, "decoder_input_ids": ids(rows, seed)[:, :5]}


def same(inputs: Any) -> Tensor:
    return inputs["input_ids"]


def decoded(inputs: Any) -> Tensor:
    return inputs["decoder_input_ids"]


def classes(inputs: Any) -> Tensor:
    return torch.arange(len(inputs["pixel_values"])) % 5


def gemma() -> nn.Module:
    import transformers as tf

    config = {**zoo.SIZE, **zoo.FEED, **zoo.WORDS, "num_key_value_heads": 2, "head_dim": 8}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**config, sliding_window=16))


def whisper() -> nn.Module:
    import transformers as tf

    layers = {"encoder_layers": 2, "decoder_layers": 2}
    layers |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    places = {"max_source_positions": 16, "max_target_positions": 64, "num_mel_bins": 8}
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = tf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, **layers, **places, **ends,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


def resnet() -> nn.Module:
    import transformers as tf

    sizes = {"embedding_size": 16, "hidden_sizes": [24, 32], "depths": [2, 2]}
    config = tf.ResNetConfig(**sizes, layer_type="basic", num_labels=5)
    return tf.ResNetForImageClassification(config)


ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Architecture(zoo.llama, text, same, writes=True),
    "Qwen3": Architecture(zoo.qwen3, text, same, writes=True),
    "Gemma 3": Architecture(gemma, text, same, writes=True),
    "GPT-2": Architecture(zoo.gpt2, text, same, writes=True),
    "Mixtral": Architecture(zoo.mixtral, text, same, writes=True),
    "BERT": Architecture(zoo.bert, text, same),
    "T5": Architecture(zoo.t5, text_twice, decoded, writes=True),
    "Whisper": Architecture(whisper, sound, decoded, writes=True),
    "ViT": Architecture(zoo.vit, picture, classes),
    "ResNet": Architecture(resnet, picture, classes),
}
# Options of `compress`, and the modules by which a form is known.
FORMS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain": ({"method": "whitened"}, {"LowRankLinear"}),
    "pivoted": ({"method": "whitened", "storage": "pivoted"}, {"PivotedLinear"}),
    "table": ({"method": "svd", "target_modules": "all"}, {"LowRankEmbedding"}),
    "shared basis": ({"method": "basis-sharing"}, {"SharedLowRankLinear"}),
    "low rank and columns": ({"method": "lowrank-sparse"}, {"LowRankSparseLinear"}),
    "low rank and entries": ({"method": "lowrank-masked"}, {"LowRankMaskedLinear"}),
    "low rank and 2:4": ({"method": "lowrank-2:4"}, {"LowRankMaskedLinear"}),
    "dense-sparse": ({"method": "dense-sparse"}, {"DenseSparseLinear"}),
    "blast": ({"method": "blast"}, {"BlastLinear"}),
    "columns and rows": ({"method": "whitened-cur"}, {"CURLinear"}),
    "integers": ({"method": "quantized", "unit": "bytes"}, {"QuantizedLinear"}),
    "convolution by channels": ({"method": "whitened-channel"}, {"ChannelConv"}),
    "convolution by axes": ({"method": "whitened-spatial"}, {"SpatialConv"}),
    "Tucker": ({"method": "whitened-tucker"}, {"TuckerConv"}),
    "convolution by frequencies": ({"method": "whitened-tubal"}, {"TubalConv"}),
}


def built(architecture: Architecture) -> nn.Module:
    torch.manual_seed(0)
    return architecture.build().eval()


def compressed(name: str, form: str) -> nn.Module | str:
    """The model in that form, or why there is none."""
    one, (options, kinds) = ARCHITECTURES[name], FORMS[form]
    data = [one.batch(4, seed) for seed in range(8)]
    try:
        lean, _ = lowrank.compress(built(one), RATIO, data=data, progress=False, **options)
    except lowrank.LowrankError as error:
        return str(error).split("\n")[0]
    if not any(type(module).__name__ in kinds for module in factored(lean).values()):
        return "-"
    return lean


def case_of(name: str, lean: nn.Module) -> Case:
    one = ARCHITECTURES[name]
    return Case(lean, one.batch, one.labels, one.writes, Path())


def silence() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def row_of(name: str, form: str, tools: Sequence[str] = tuple(TOOLS)) -> dict[str, str] | str:
    """What each tool says of one form, or why the architecture does not have it."""
    silence()
    lean = compressed(name, form)
    if isinstance(lean, str):
        return lean
    cells = {}
    for tool in tools:
        try:
            with limited(SECONDS):
                cells[tool] = tried(tool, case_of(name, lean))
        except TooLong as error:
            cells[tool] = f"fault: {error}"
    return cells


def rows(
    jobs: int, names: Sequence[str], forms: Sequence[str], tools: Sequence[str]
) -> Iterator[dict[str, Any]]:
    asked = [(name, form) for name in names for form in forms]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        alone = [tool for tool in tools if tool != SHARDED]
        found = pool.map(row_of, *zip(*asked, strict=True), [alone] * len(asked))
        for (name, form), cells in zip(asked, found, strict=True):
            yield {"architecture": name, "form": form, "cells": cells}


def sharded(name: str, forms: Sequence[str]) -> dict[str, str]:
    """Form -> what FSDP2 says of it, in two processes that serve all forms."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        folder = Path(directory)
        for key, value in (
            ("ARCHITECTURE", name),
            ("FORMS", "|".join(forms)),
            ("FOLDER", directory),
        ):
            patch.setenv(key, value)
        found: dict[str, str] = in_processes("tests.sharding", "cells", folder)[0]
    return found


def faults(found: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{row['architecture']}, {row['form']}: {tool}: {said}"
        for row in found
        if isinstance(row["cells"], dict)
        for tool, said in row["cells"].items()
        if said.startswith("fault")
    ]


def page(found: Sequence[dict[str, Any]]) -> str:
    """The tables as Markdown, one an architecture; reasons stand below, by number."""
    reasons: dict[str, int] = {}

    def number(said: str) -> str:
        if said in ("yes", "-"):
            return said
        return f"[{reasons.setdefault(said, len(reasons) + 1)}]"

    lines: list[str] = []
    for name in dict.fromkeys(row["architecture"] for row in found):
        lines += [f"## {name}", "", f"| form | {' | '.join(COLUMNS)} |"]
        lines += [f"|{' --- |' * (1 + len(COLUMNS))}"]
        for row in found:
            if row["architecture"] == name and isinstance(row["cells"], dict):
                cells = [number(row["cells"].get(column, "-")) for column in COLUMNS]
                lines.append(f"| {row['form']} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Reasons", "", *(f"{place}. {said}" for said, place in reasons.items()), ""]
    return "\n".join(lines)


INTRODUCTION = f"""# Which form works with which tool

Tiny random models, compressed to {RATIO} in every stored form that their layers can have, and what
was done with each. Written by `make matrix`, of which some cells run in every check. Forms that
no layer of an architecture takes are left out. A number is a reason, below.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--tools", nargs="+", default=COLUMNS)
    given = parser.parse_args()
    start, found = time.monotonic(), []
    for row in rows(given.jobs, given.architectures, given.forms, given.tools):
        found.append(row)
        said = row["cells"]
        other = {k: v for k, v in said.items() if v != "yes"} if isinstance(said, dict) else said
        print(f"{row['architecture']:10} {row['form']:24} {other or ''}", flush=True)
    for name in given.architectures if SHARDED in given.tools else ():
        said = sharded(name, given.forms)
        print(
            f"{name:10} {SHARDED}: { {k: v for k, v in said.items() if v != 'yes'} or '' }",
            flush=True,
        )
        for row in found:
            if row["architecture"] == name and isinstance(row["cells"], dict):
                row["cells"][SHARDED] = said[row["form"]]
    wrong = faults(found)
    cells = sum(len(row["cells"]) for row in found if isinstance(row["cells"], dict))
    print(f"{cells} cells, {len(wrong)} faults, {time.monotonic() - start:.0f} s")
    print("\n".join(wrong))
    RESULTS.write_text(json.dumps(merged(found), indent=1) + "\n")
    PAGE.write_text(INTRODUCTION + page(merged(found)))


def merged(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kept results, with what a run of some of the cells found in their place."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    every = {(row["architecture"], row["form"]): row["cells"] for row in kept}
    for row in found:
        place, cells = (row["architecture"], row["form"]), row["cells"]
        before = every.get(place)
        both = isinstance(before, dict) and isinstance(cells, dict)
        every[place] = {**before, **cells} if both else cells
    return [{"architecture": one, "form": form, "cells": c} for (one, form), c in every.items()]


if __name__ == "__main__":
    main()
