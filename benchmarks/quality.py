"""KL of every effort beside the field's methods: same calibration, same stored parameters.

    python benchmarks/quality.py [--model FOLDER --text FILE] [--ratios 0.8 0.6 0.4] [--only NAME …]

Without --model: the model inside the package. Rows of 256 tokens; of a text given, the first 60 %
calibrate (172 rows of stories260K's own samples: methods of the field were published so), the rest
is evaluated once. AA-SVD-like: whitened uniform plain factors and block refit with as many steps as
`best` takes in all, the better of two rates. MPIFA-like: whitened uniform pivoted and sequential
refit with a quarter of the target from the dense stream. No rank alignment; fp32.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import torch
from machine import keep

import lowrank
from lowrank import Recovery, demo
from lowrank.demo import judge

PLAIN = {"policy": "uniform", "storage": "factors"}
BEST = lowrank.EFFORTS["best"].recovery
RIVALS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", **PLAIN},
    "fwsvd": {"method": "fwsvd", **PLAIN},
    "asvd": {"method": "asvd", **PLAIN},
    "whitened (SVD-LLM)": {"method": "whitened", **PLAIN},
    "MPIFA-like": {
        "method": "whitened", "policy": "uniform", "storage": "pivoted",
        "effort": Recovery(dense=0.25),
    },
    **{
        f"AA-SVD-like, rate {rate}": {
            "method": "whitened", **PLAIN,
            "effort": Recovery(refit=False, block_steps=steps, block_rate=rate),
        }
        for steps in [BEST.block_steps + BEST.distill_steps] for rate in (0.003, 0.01)
    },
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "best": {"effort": "best"},
}  # fmt: skip


def rows_of(args: argparse.Namespace) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """The dense model, calibration rows (n, 256), and held-out rows of 257."""
    if args.model is None:
        tiny = demo.tiny_lm()
        ids = torch.tensor(tiny.tokenizer(tiny.calibration, verbose=False)["input_ids"])
        count = len(ids) // 256
        return tiny.model, ids[: count * 256].view(count, 256), demo.held_out_rows(tiny)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    count = len(ids) // 257
    rows = ids[: count * 257].view(count, 257)
    parted = round(0.6 * count)
    return model, rows[:parted, :-1], list(rows[parted:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--only", nargs="+", default=list(RIVALS))
    args = parser.parse_args()
    torch.set_num_threads(2)
    dense, calibration, held_out = rows_of(args)
    data = list(calibration.split(16))
    found = []
    print(f"{'method':26} {'ratio':>5} {'kept':>7} {'bytes':>10} {'KL':>8} {'ppl':>9} {'s':>6} MiB")
    for ratio in args.ratios:
        for name in args.only:
            started = time.perf_counter()
            model, report = lowrank.compress(
                dense, ratio, data=data, align=1, copy=True, progress=False, **RIVALS[name]
            )
            seconds = time.perf_counter() - started
            (_, (ppl, away)) = judge([dense, model], held_out)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(
                f"{name:26} {ratio:5.1f} {report.achieved:7.4f} {report.bytes_after:10,} "
                f"{away:8.4f} {ppl:9.2f} {seconds:6.1f} {peak}",
                flush=True,
            )
            found.append(
                {
                    "method": name, "ratio": ratio, "kept": report.achieved, "kl": away,
                    "params": report.params_after, "bytes": report.bytes_after,
                    "perplexity": ppl, "seconds": seconds, "peak_mib_so_far": peak,
                    "notes": report.notes,
                }
            )  # fmt: skip
    title = "embedded" if args.model is None else Path(args.model).name
    keep(f"quality_{title}", found, calibration_rows=len(calibration), held_out=len(held_out))


if __name__ == "__main__":
    main()
