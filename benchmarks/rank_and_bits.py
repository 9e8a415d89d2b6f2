"""KL of rank and bits at equal file bytes: integers, low rank, both, and the mix of `quantized`.

    python benchmarks/rank_and_bits.py [--models embedded stories260K] [--ratios 0.5 0.35 0.25 0.2]
                                       [--only NAME …] [--rows 64] [--threads 1]
    python benchmarks/rank_and_bits.py --model FOLDER --text FILE --rows 64 [--held-out 32]

The embedded model, and stories260K where LOWRANK_ASSETS is set, or a model of your own: all layers
but the head, to a share of the bytes that bfloat16 takes, scales counted. One calibration, of the
model in fp32, serves all rows; scales and factors are bfloat16, and the judged model computes in
fp32 with them. "nearest" rounds each number alone; "inputs" carries errors on as GPTQ does, and the
others on both sides. Integers of one width have the bytes that they have; the mix is measured at
those too, as "mix, as NAME". Of narrower layers 128 is a whole row. No recovery, but the
closed-form refit of "mix, refitted".
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from pathlib import Path
from typing import Any

import torch
from machine import keep
from torch import Tensor

import lowrank
from lowrank import Recovery
from lowrank.demo import LENGTH, held_out_rows, judge, tiny_lm
from lowrank.methods import Quantized

ROWS = 32  # held out
WHOLE, FACTORS, BOTH = "quantized", "quantized-factors", "quantized-lowrank"


def integers(bits: int, group: int, **options: Any) -> dict[str, Any]:
    method = Quantized(forms=(WHOLE,), bits=(bits,), groups=(group,), **options)
    return {"method": method, "policy": "uniform"}


FIXED: dict[str, dict[str, Any]] = {
    "int8, nearest": integers(8, 0, rounding="nearest"),
    "int4 of 32, nearest": integers(4, 32, rounding="nearest"),
    "int4 of 128, nearest": integers(4, 128, rounding="nearest"),
    "int4 of 32, inputs": integers(4, 32, two_sided=False),
    "int4 of 128, inputs": integers(4, 128, two_sided=False),
    "int4 of 128": integers(4, 128),
}
BUDGET: dict[str, dict[str, Any]] = {
    "low rank, 16 bits": {"method": "two-sided", "policy": "spectrum"},
    "low rank, int8": {"method": Quantized(forms=(FACTORS,), factor_bits=(8,))},
    "bits, nearest": {"method": Quantized(forms=(WHOLE,), rounding="nearest")},
    "bits": {"method": Quantized(forms=(WHOLE,))},
    "bits + low rank": {"method": Quantized(forms=(BOTH,))},
    "mix": {"method": Quantized()},
    "mix, refitted": {"method": Quantized(), "policy": "spectrum", "effort": Recovery()},
}


def embedded(rows: int | None, held_out: int) -> tuple[Any, Tensor, list[Tensor]]:
    """The model, calibration rows (n, LENGTH), and held-out rows of LENGTH + 1."""
    tiny = tiny_lm()
    ids = torch.tensor(tiny.tokenizer(tiny.calibration, verbose=False)["input_ids"])
    count = len(ids) // LENGTH
    calibration = ids[: count * LENGTH].view(count, LENGTH)[:rows]
    return tiny.model, calibration, held_out_rows(tiny)[-held_out:]


def own(
    folder: str, text: str, rows: int | None, held_out: int
) -> tuple[Any, Tensor, list[Tensor]]:
    """The same of a folder: the text's first rows calibrate, its last are held out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = Path(text).read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(words, verbose=False).input_ids)
    count = len(ids) // (LENGTH + 1)
    every = ids[: count * (LENGTH + 1)].view(count, LENGTH + 1)
    most = count - held_out
    return model, every[: min(rows or most, most), :-1], list(every[-held_out:])


def compared(
    title: str, dense: Any, calibration: Tensor, rows: list[Tensor], args: argparse.Namespace
) -> list[dict[str, Any]]:
    seen = lowrank.calibrate(dense, list(calibration.split(16)), progress=False)
    seen = lowrank.with_fisher(dense, seen)
    low, found = copy.deepcopy(dense).bfloat16(), []
    print(f"\n{title}\n{'what':28} {'asked':>6} {'kept':>7} {'KL':>9} s")

    def add(name: str, ratio: float, how: dict[str, Any]) -> float:
        started = time.perf_counter()
        try:
            model, report = lowrank.compress(
                low, ratio, unit="bytes", align=1, data=seen, copy=True, progress=False, **how
            )
        except lowrank.LowrankError as error:
            print(f"{name:28} {ratio:6.4f} {error}", flush=True)
            return 0.0
        seconds = time.perf_counter() - started
        away = judge([dense, model.float()], rows)[1][1]
        ranked = sum("lowrank" in entry.storage for entry in report.plan.entries)
        print(
            f"{name:28} {ratio:6.4f} {report.achieved:7.4f} {away:9.5f} {seconds:.0f}", flush=True
        )
        found.append(
            {
                "model": title, "what": name, "asked": ratio, "kept": report.achieved, "kl": away,
                "bytes": report.bytes_after, "with low rank": ranked, "seconds": seconds,
            }
        )  # fmt: skip
        keep(f"rank_and_bits_{title}", found, held_out_rows=len(rows))
        return report.achieved

    for name, how in FIXED.items():
        if name in args.only:
            kept = add(name, 0.9, how)
            if "mix" in args.only and "nearest" not in name and kept:
                add(f"mix, as {name}", kept, BUDGET["mix"])
    for ratio in args.ratios:
        for name, how in BUDGET.items():
            if name in args.only:
                add(name, ratio, how)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["embedded", "stories260K"])
    parser.add_argument("--model", help="a folder of transformers' format")
    parser.add_argument("--text", help="a file, with --model")
    parser.add_argument("--rows", type=int, help="of calibration; default: all but those held out")
    parser.add_argument("--held-out", type=int, default=ROWS)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.35, 0.25, 0.2])
    parser.add_argument("--only", nargs="+", default=[*FIXED, *BUDGET])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model:
        loaded = own(args.model, args.text, args.rows, args.held_out)
        compared(Path(args.model).name, *loaded, args)
        return
    for title in args.models:
        if title == "embedded":
            compared(title, *embedded(args.rows, args.held_out), args)
        elif "LOWRANK_ASSETS" in os.environ:
            assets = Path(os.environ["LOWRANK_ASSETS"])
            text = assets / "text" / "stories260K_selfgenerated.txt"
            folder = str(assets / title)
            compared(title, *own(folder, str(text), args.rows, args.held_out), args)
        else:
            print("LOWRANK_ASSETS is unset: the embedded model alone")


if __name__ == "__main__":
    main()
