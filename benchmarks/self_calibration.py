"""How close does text that the model wrote itself come to real text, as calibration?

    python benchmarks/self_calibration.py

The embedded model, `whitened`, uniform ranks, fp32: mean KL to the dense model on a quarter of
the held-out text, for each third of the real calibration text, and for what the model writes from
three seeds: as many tokens, in rows of the same length or of a quarter of it, and with other
first tokens; and for what `data="self"` takes, which is twice as much.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import mean

import torch
from machine import keep
from torch import Tensor

import lowrank
from lowrank.calibration import self_written
from lowrank.calibration.batches import text_rows
from lowrank.demo import LENGTH, TinyLM, held_out_rows, judge, tiny_lm

RATIOS = (0.8, 0.6, 0.4)
SEEDS = (0, 1, 2)
SHARES = (0.0, 0.25, 0.5, 1.0)  # of rows from the start token
ROWS = 96  # of LENGTH tokens, for real and for written text


def main() -> None:
    torch.set_num_threads(1)  # small products gain little from more
    tiny = tiny_lm()
    held_out = held_out_rows(tiny)[::4]
    rows = []
    print(f"{'calibrated on':30} {'seed':>4} {'write s':>8}" + "".join(f"{k:8.1f}" for k in RATIOS))
    for name, seed, seconds, tokens in kinds(tiny):
        seen = lowrank.calibrate(tiny.model, list(tokens.split(16)), progress=False)
        models = [
            lowrank.compress(tiny.model, k, method="whitened", data=seen, copy=True,
                             progress=False)[0]
            for k in RATIOS
        ]  # fmt: skip
        away = [found for _, found in judge([tiny.model, *models], held_out)[1:]]
        print(f"{name:30} {seed:4} {seconds:8.1f}" + "".join(f"{x:8.3f}" for x in away), flush=True)
        rows.append({
            "data": name, "seed": seed, "tokens": tokens.numel(), "seconds": seconds,
            "kl": dict(zip(map(str, RATIOS), away, strict=True)),
        })  # fmt: skip
    real = averages([row for row in rows if row["data"] == "real text"])
    print("mean KL over the mean KL with real text:")
    for name in dict.fromkeys(str(row["data"]) for row in rows):
        own = averages([row for row in rows if row["data"] == name])
        print(f"{name:44}" + "".join(f"{a / b:8.3f}" for a, b in zip(own, real, strict=True)))
    keep("self_calibration", rows)


def kinds(tiny: TinyLM) -> Iterator[tuple[str, int, float, Tensor]]:
    """What is calibrated on: name, seed, seconds it took to write, token ids."""
    real = [r for r in text_rows(tiny.calibration, tiny.tokenizer, LENGTH) if len(r) == LENGTH]
    for seed in SEEDS:
        yield "real text", seed, 0.0, torch.stack(real[seed * ROWS : (seed + 1) * ROWS])
    for share in SHARES:
        for seed in SEEDS:
            yield (
                f"{share:.0%} from the start token",
                seed,
                *written(tiny, share, ROWS, LENGTH, seed),
            )
    for seed in SEEDS:
        short = written(tiny, self_written.FROM_START, 4 * ROWS, LENGTH // 4, seed)
        yield f"rows of {LENGTH // 4} tokens", seed, *short
    for seed in SEEDS:
        default = written(tiny, self_written.FROM_START, self_written.COUNT, LENGTH, seed)
        yield f"{self_written.COUNT} rows, the default", seed, *default


def written(tiny: TinyLM, share: float, rows: int, length: int, seed: int) -> tuple[float, Tensor]:
    usual, started = self_written.FROM_START, time.perf_counter()
    self_written.FROM_START = share
    try:
        tokens = self_written.write(tiny.model, rows=rows, length=length, seed=seed)
    finally:
        self_written.FROM_START = usual
    return time.perf_counter() - started, tokens


def averages(rows: list[dict[str, object]]) -> list[float]:
    return [mean(row["kl"][str(k)] for row in rows) for k in RATIOS]  # type: ignore[index]


if __name__ == "__main__":
    main()
