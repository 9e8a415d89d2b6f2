"""Bytes and quality of factored weights in int8, by torchao.

    pip install --no-deps --target build/torchao torchao==0.18.0
    PYTHONPATH=build/torchao python benchmarks/quantised.py      # needs LOWRANK_ASSETS

stories260K, dense and with `effort="fast"` at 0.6, the latter as it is and with the weights of its
linear layers in int8 (one scale a row), with and without the head, in 32 and 16 bits. Bytes of the
safetensors files; KL from the dense model in 32 bits on held-out stories, after loading.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import keep
from torch import nn

import lowrank
from lowrank.measure.eval import kl

RATIO, LENGTH, HELD_OUT = 0.6, 256, 6  # batches of eight rows


def rows_of(tokenizer: Any, text: str) -> list[torch.Tensor]:
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    count = len(ids) // LENGTH
    return list(ids[: count * LENGTH].view(count, LENGTH).split(8))


def in_int8(model: Any, *, head: bool) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and (head or not name.startswith("lm_head"))

    quantize_(model, Int8WeightOnlyConfig(), chosen)
    return model


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    assets = Path(os.environ["LOWRANK_ASSETS"])
    source = assets / "stories260K"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    text = (assets / "text" / "stories260K_selfgenerated.txt").read_text("utf-8")
    batches = rows_of(tokenizer, text)
    calibration, held_out = batches[:-HELD_OUT], batches[-HELD_OUT:]
    dense = lowrank.from_pretrained(source).eval()
    small, _ = lowrank.compress(
        dense, RATIO, data=calibration, effort="fast", copy=True, progress=False
    )
    found = []
    print(f"{'model':30} {'bits':>4} {'bytes':>9} {'KL':>7}")
    for dtype, bits in ((torch.float32, 32), (torch.bfloat16, 16)):
        for name in ("dense", "factored", "factored, int8", "factored, int8 without the head"):
            model = fresh(dense if name == "dense" else small, dtype)
            if "int8" in name:
                in_int8(model, head="without" not in name)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
                again = lowrank.from_pretrained(folder).eval()
                away = float(kl(again, dense, held_out))
            found.append({"model": name, "bits": bits, "bytes": size, "kl": away})
            print(f"{name:31} {bits:4} {size:9,} {away:7.4f}", flush=True)
    keep("quantised", found, ratio=RATIO)


def fresh(model: Any, dtype: torch.dtype) -> Any:
    """A model of that dtype as one that was loaded, whose config says it."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return lowrank.from_pretrained(folder, dtype=dtype).eval()


if __name__ == "__main__":
    main()
