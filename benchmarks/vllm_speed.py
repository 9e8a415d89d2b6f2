"""Tokens a second in vLLM's engine: reading prompts and writing, of one request and of sixteen.

    make vllm-check                                      # makes vLLM's environment, build/vllm
    build/vllm/bin/python benchmarks/vllm_speed.py DENSE FOLDER … [--rounds 3]

Every folder runs in a process of its own, in turn, `--rounds` times; medians. float32, eager, two
threads; prompts of 256 tokens, 64 tokens written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import keep

READ, WRITTEN, REQUESTS = 256, 64, (1, 16)
SETTINGS = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip


def measured(folder: str) -> dict[str, float]:
    """Tokens a second, by what is done and for how many requests."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder, dtype="float32", max_model_len=READ + WRITTEN, enforce_eager=True,
        max_num_seqs=max(REQUESTS), enable_prefix_caching=False,
    )  # fmt: skip
    draw = random.Random(0)
    found = {}
    for many in REQUESTS:
        prompts: Any = [
            {"prompt_token_ids": [draw.randrange(200, 1000) for _ in range(READ)]}
            for _ in range(many)
        ]

        def seconds(new: int, prompts: Any = prompts) -> float:
            greedy = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
            start = time.perf_counter()
            engine.generate(prompts, greedy, use_tqdm=False)
            return time.perf_counter() - start

        seconds(1)
        reading = min(seconds(1) for _ in range(2))
        found[f"read {many}"] = many * READ / reading
        found[f"write {many}"] = many * (WRITTEN - 1) / (seconds(WRITTEN) - reading)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.folders[0])))
        return
    found: dict[str, list[dict[str, float]]] = {folder: [] for folder in given.folders}
    for _ in range(given.rounds):
        for folder in given.folders:
            done = subprocess.run(
                [sys.executable, __file__, folder, "--one"],
                check=True, capture_output=True, text=True, env={**os.environ, **SETTINGS},
            )  # fmt: skip
            found[folder].append(json.loads(done.stdout.splitlines()[-1]))
    torch.set_num_threads(int(SETTINGS["OMP_NUM_THREADS"]))
    dense = found[given.folders[0]]
    rows = []
    for folder, runs in found.items():
        row: dict[str, Any] = {"model": Path(folder).name}
        for key in dense[0]:
            row[key] = median(run[key] for run in runs)
            row[f"{key}, of dense"] = median(
                run[key] / other[key] for run, other in zip(runs, dense, strict=True)
            )
        rows.append(row)
        figures = [f"{k} {row[k]:8.1f} ({row[f'{k}, of dense']:.2f})" for k in dense[0]]
        print(f"{row['model']:36} {'  '.join(figures)}", flush=True)
    keep("vllm_speed", rows, vllm=version("vllm-cpu"))


if __name__ == "__main__":
    main()
