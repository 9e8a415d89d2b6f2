"""Memory of compression from folder to folder, by the depth of the model.

    python benchmarks/stream.py [--blocks 4 8 16] [--width 512] [--rows 16] [--effort fast]

Random Llamas of equal blocks in bf16, saved in shards, compressed to 0.8 in a process of their own,
two threads. `anonymous` is the peak of memory that lies in no file (RssAnon, Linux), less that of
the same process with its imports alone; `estimate` the same by lowrank.estimate beforehand; `model`
the size of the weights.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from machine import keep

RATIO, LENGTH, VOCABULARY, MIB = 0.8, 256, 8192, 1 << 20


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def build(folder: Path, blocks: int, width: int) -> int:
    """Save a random model; its bytes."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 128,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, dtype="bfloat16",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def compressed(folder: Path, rows: int, effort: str) -> dict[str, float]:
    """Compress it in this process, and measure."""
    import lowrank

    importlib.import_module("transformers")  # no part of what is measured

    torch.set_num_threads(2)
    draw = torch.Generator().manual_seed(0)
    data = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=draw)
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        report = lowrank.compress(
            str(folder),
            RATIO,
            data=[data],
            effort=effort,
            out=folder.parent / "out",
            progress=False,
        )
    finally:
        done.set()
        watcher.join()
    seconds = time.perf_counter() - start
    return {"anonymous": peak[0] - before, "seconds": seconds, "kept": report.achieved}


def expected(folder: Path, rows: int, effort: str) -> dict[str, float]:
    """What `lowrank.estimate` says of the anonymous memory, above that of the imports."""
    import lowrank

    importlib.import_module("transformers")
    torch.set_num_threads(2)
    before = anonymous()
    estimate = lowrank.estimate(folder, RATIO, effort=effort, rows=rows, length=LENGTH)
    return {"estimate": estimate.from_disk - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--expected", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        measure = expected if given.expected else compressed
        print(json.dumps(measure(given.folder, given.rows, given.effort)))
        return
    print(
        f"{'blocks':>6} {'model':>8} {'anonymous':>9} {'estimate':>9} {'s':>6} {'s a block':>9} "
        f"{'kept':>6}"
    )
    rows = []
    for blocks in given.blocks:
        with tempfile.TemporaryDirectory(dir=".") as directory:
            folder = Path(directory) / "model"
            size = build(folder, blocks, given.width)
            own = ["--folder", str(folder), "--rows", str(given.rows), "--effort", given.effort]
            row: dict[str, float] = {"blocks": blocks, "model": size}
            for more in (["--expected"], []):
                done = subprocess.run(
                    [sys.executable, __file__, *own, *more],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{blocks:6} {size / MIB:5.0f} MiB {row['anonymous'] / MIB:5.0f} MiB "
            f"{row['estimate'] / MIB:5.0f} MiB "
            f"{row['seconds']:6.0f} {row['seconds'] / blocks:9.1f} {row['kept']:6.3f}",
            flush=True,
        )
    keep("stream", rows, width=given.width, calibration_rows=given.rows, effort=given.effort)


if __name__ == "__main__":
    main()
