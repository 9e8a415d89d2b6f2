"""Memory of compression from folder to folder, by the depth of the model.

    python benchmarks/stream.py [--blocks 12 24 48] [--width 512] [--rows 16] [--effort fast]
                               [--dtype bfloat16] [--in-memory]

Random Llamas of equal blocks, saved in shards, compressed to 0.8 in a process of their own,
two threads. `anonymous` is the peak of memory that lies in no file (RssAnon, Linux), less that of
the same process with its imports alone; `bound` one dense block, its statistics and 300 MB;
`estimate` the peak by lowrank.estimate beforehand; `model` the size of the weights. With
`--in-memory` they are compressed as models in memory, whose weights transformers maps from the file
too.
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
from typing import Any

import torch
from machine import keep

Row = dict[str, float]
RATIO, LENGTH, VOCABULARY, MIB = 0.8, 256, 8192, 1 << 20


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def bound(width: int, itemsize: int) -> int:
    """Bytes of a dense block, of its statistics, and 300 MB."""
    inside, half = 11 * width // 4, width // 2
    layers = [(width, width), (half, width), (half, width), (width, width)]
    layers += [(inside, width), (inside, width), (width, inside)]
    inputs = [width, width, width, inside]  # q, k and v read one tensor, gate and up another
    statistics = 8 * (sum(n * n for n in inputs) + sum(out * out for out, _ in layers))
    return sum(itemsize * out * read for out, read in layers) + statistics + 300_000_000


def build(folder: Path, blocks: int, width: int, dtype: str = "bfloat16") -> int:
    """Save a random model; its bytes."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=blocks,
        num_attention_heads=width // 64, num_key_value_heads=width // 128,
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, dtype=dtype,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def measured(folder: Path, rows: int, *, in_memory: bool = False, **options: Any) -> Row:
    """Compress it in this process, and measure.

    Args:
        in_memory: loaded first, and given as a model.
    """
    import lowrank

    transformers = importlib.import_module("transformers")
    importlib.import_module("transformers.models.llama.modeling_llama")  # loaded with a model
    torch.set_num_threads(2)
    draw = torch.Generator().manual_seed(0)
    data = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=draw)
    options |= {"data": [data], "progress": False}
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        if in_memory:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
            _, report = lowrank.compress(model, RATIO, **options)
        else:
            report = lowrank.compress(str(folder), RATIO, out=folder.parent / "out", **options)
    finally:
        done.set()
        watcher.join()
    seconds = time.perf_counter() - start
    return {"anonymous": peak[0] - before, "seconds": seconds, "kept": report.achieved}


def expected(folder: Path, rows: int, effort: str) -> Row:
    """What `lowrank.estimate` says of the anonymous memory, above that of the imports."""
    import lowrank

    importlib.import_module("transformers.models.llama.modeling_llama")
    torch.set_num_threads(2)
    before = anonymous()
    estimate = lowrank.estimate(folder, RATIO, effort=effort, rows=rows, length=LENGTH)
    return {"estimate": estimate.from_disk - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--expected", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", action="store_true")
    given = parser.parse_args()
    if given.folder:
        if given.expected:
            found = expected(given.folder, given.rows, given.effort)
        else:
            options = {"in_memory": given.in_memory, "effort": given.effort}
            found = measured(given.folder, given.rows, **options)
        print(json.dumps(found))
        return
    print(
        f"{'blocks':>6} {'model':>8} {'anonymous':>9} {'bound':>9} {'estimate':>9} {'s':>6} "
        f"{'s a block':>9} {'kept':>6}"
    )
    rows, itemsize = [], getattr(torch, given.dtype).itemsize
    about = {"width": given.width, "calibration_rows": given.rows, "effort": given.effort}
    place = "in_memory_" if given.in_memory else ""
    for blocks in given.blocks:
        with tempfile.TemporaryDirectory(dir=".") as directory:
            folder = Path(directory) / "model"
            size = build(folder, blocks, given.width, given.dtype)
            own = ["--folder", str(folder), "--rows", str(given.rows), "--effort", given.effort]
            row: Row = {"blocks": blocks, "model": size, "bound": bound(given.width, itemsize)}
            for more in (["--expected"], ["--in-memory"] * given.in_memory):
                done = subprocess.run(
                    [sys.executable, __file__, *own, *more],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                row |= json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{blocks:6} {size / MIB:4.0f} MiB {row['anonymous'] / MIB:5.0f} MiB "
            f"{row['bound'] / MIB:5.0f} MiB {row['estimate'] / MIB:5.0f} MiB "
            f"{row['seconds']:6.0f} {row['seconds'] / blocks:9.1f} {row['kept']:6.3f}",
            flush=True,
        )
        keep(f"stream_{place}{given.width}_{given.dtype}", rows, **about)


if __name__ == "__main__":
    main()
