"""Memory on the shapes of a 7B Llama: the first blocks from folder to folder, beside the estimate.

    python benchmarks/large_llama.py [--blocks 2] [--rows 16]

Shapes of Llama-2-7B (arXiv 2307.09288): width 4096, 11008 inside, 32 heads, 32 blocks, vocabulary
32,000; random weights in bf16, rows of 256 random tokens. Of the whole model the config alone is
written: `lowrank.estimate` reads no weight. Its first blocks are compressed to 0.8 in a process of
their own, with what `fast` does but for the comparison of candidates: gradients, two-sided factors,
pivoted, refitted block by block. Memory that lies in no file (RssAnon), less that of the imports.
Two threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import keep
from stream import LENGTH, MIB, RATIO, measured

OPTIONS: dict[str, Any] = {"effort": "fast", "policy": "uniform"}
BLOCKS = 32


def config_of(blocks: int) -> Any:
    import transformers

    return transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32_000,
        max_position_embeddings=4096, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def build(folder: Path, blocks: int) -> None:
    """Save random blocks, in bf16 from the start."""
    import transformers

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(config_of(blocks))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")


def described(folder: Path, rows: int) -> dict[str, float]:
    """What `lowrank.estimate` says of a folder that holds a config at least."""
    import lowrank
    from lowrank.plans.stages import anonymous_bytes

    before = anonymous_bytes()
    found = lowrank.estimate(folder, RATIO, rows=rows, length=LENGTH, **OPTIONS)
    seconds = [stage.seconds for stage in found.stages if stage.seconds is not None]
    return {
        "params": found.params, "estimate": found.from_disk - before, "scratch": found.scratch,
        "expected_seconds": sum(seconds),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--build", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(2)
    if given.build:
        build(given.folder, given.build)
        return
    if given.folder:
        print(json.dumps(measured(given.folder, given.rows, **OPTIONS)))
        return
    with tempfile.TemporaryDirectory(dir=".") as directory:
        whole, part = Path(directory) / "whole", Path(directory) / "part"
        config_of(BLOCKS).save_pretrained(whole)
        rows = [{"blocks": BLOCKS, **described(whole, given.rows)}]
        own = [sys.executable, __file__, "--rows", str(given.rows), "--folder", str(part)]
        subprocess.run([*own, "--build", str(given.blocks)], check=True, capture_output=True)
        rows.append({"blocks": given.blocks, **described(part, given.rows)})
        done = subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True)
        rows[-1] |= json.loads(done.stdout.splitlines()[-1])
    print(f"{'blocks':>6} {'parameters':>14} {'estimate':>10} {'measured':>10} {'s':>6}")
    for row in rows:
        shown = f"{row['anonymous'] / MIB:6.0f} MiB" if "anonymous" in row else ""
        print(
            f"{row['blocks']:6} {row['params']:14,} {row['estimate'] / MIB:6.0f} MiB {shown:>10} "
            f"{row.get('seconds', row['expected_seconds']):6.0f}"
        )
    keep("large_llama", rows, calibration_rows=given.rows)


if __name__ == "__main__":
    main()
