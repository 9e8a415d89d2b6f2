"""What one call of `compress` enters: `python -m tests.trace [all]`.

A two-layer Llama is compressed with effort="fast", and every function of the package that runs is
noted. How far a reader has to go to follow one call, and how often the work is done.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType

import torch

import lowrank

ROOT = Path(lowrank.__file__).parent
# (file, function) -> how the report calls it
WATCHED = {
    ("walk/sites.py", "find_sites"): "walks over the model",
    ("recover/sequential.py", "SequentialPass.run"): "refit passes over the blocks",
    ("calibration/chain.py", "Recording.record"): "batches recorded for chains of blocks",
    ("calibration/chain.py", "Chain.__init__"): "chains that run on what was recorded",
}


BATCHES = 5  # of 16 rows: 56 rows for fitting, and 8 that are held out


def traced() -> tuple[Counter[tuple[str, str]], int]:
    """Calls by (file, function), and forward passes of whole models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = torch.randint(0, 128, (64, 32), generator=torch.Generator().manual_seed(0))
    calls: Counter[tuple[str, str]] = Counter()
    passes, forward = 0, LlamaForCausalLM.forward.__wrapped__.__code__

    def note(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal passes
        if event != "call":
            return
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            calls[path.relative_to(ROOT).as_posix(), frame.f_code.co_qualname] += 1
        passes += frame.f_code is forward

    sys.setprofile(note)
    try:
        lowrank.compress(model, 0.6, data=list(rows.split(16)), effort="fast", progress=False)
    finally:
        sys.setprofile(None)
    return calls, passes


def main() -> None:
    torch.set_num_threads(1)
    calls, passes = traced()
    files = sorted({file for file, _ in calls})
    print(f"files entered: {len(files)}")
    print(f"functions entered: {len(calls)}")
    for watched, what in WATCHED.items():
        print(f"{what}: {calls[watched]}")
    print(f"forward passes of a whole model: {passes}")
    if "all" in sys.argv[1:]:
        for (file, function), times in sorted(calls.items()):
            print(f"{file:28} {times:6} {function}")


if __name__ == "__main__":
    main()
