"""KL of every effort beside the field's methods: same calibration, same stored parameters.

    python benchmarks/quality.py [--model FOLDER --text FILE] [--ratios 0.8 0.6 0.4] [--only NAME …]
                                 [--seeds 0 1 2 --rows 192] [--steps 0.5] [--title NAME]
                                 [--threads 1]
    python benchmarks/quality.py --summary embedded_seeds embedded_seeds12

Without --model: the model inside the package. Rows of 256 tokens; of a text given, the first 60 %
calibrate (172 rows of stories260K's own samples: methods of the field were published so), the rest
is evaluated once. With --rows, every seed draws so many of the calibration rows. AA-SVD-like:
whitened uniform plain factors and block refit with as many steps of as many tokens as `best` takes
in all, at two rates of which the better counts. MPIFA-like: whitened uniform pivoted and sequential
refit with a quarter of the target from the dense stream. "lowrank-masked" runs only by name.
--steps: share of the gradient steps, of ours and of AA-SVD-like alike. No rank alignment; fp32.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import RESULTS, keep

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
        "effort": Recovery(dense=0.25, sums=False, shrinkage=0.0, temperature=False),
    },
    **{
        f"AA-SVD-like, rate {rate}": {
            "method": "whitened", **PLAIN,
            "effort": Recovery(
                refit=False, temperature=False, block_steps=steps, block_rate=rate,
                rows=BEST.rows, optimizer="adamw",
            ),
        }
        for steps in [BEST.block_steps + BEST.distill_steps] for rate in (0.003, 0.01)
    },
    "fast, uniform ranks": {"effort": "fast", "policy": "uniform"},
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "best": {"effort": "best"},
}  # fmt: skip
MASKED: dict[str, dict[str, Any]] = {  # small files alone: what they multiply is not less
    f"lowrank-masked, {effort}": {"method": "lowrank-masked", "effort": effort}
    for effort in ("fast", "best")
}


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--steps", type=float, default=1.0)
    parser.add_argument("--title")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--summary", nargs="+", metavar="TITLE", help="print kept results' means")
    args = parser.parse_args()
    if args.summary:
        summary(args.summary)
        return
    torch.set_num_threads(args.threads)
    dense, calibration, held_out = rows_of(args)
    title = args.title or ("embedded" if args.model is None else Path(args.model).name)
    found: list[dict[str, Any]] = []
    print(f"{'method':26} {'ratio':>5} seed {'kept':>7} {'bytes':>10} {'KL':>8} {'ppl':>9} s MiB")
    for seed in args.seeds:
        data = list(drawn(calibration, args.rows, seed).split(16))
        for ratio in args.ratios:
            for name in args.only:
                options = shortened({**RIVALS, **MASKED}[name], args.steps)
                found.append(
                    {"method": name, "seed": seed}
                    | measured(dense, ratio, data, seed, options, held_out)
                )
                said = "{method:26} {ratio:5.1f} {seed:4} {kept:7.4f} {bytes:10,} {kl:8.4f}"
                said += " {perplexity:9.2f} {seconds:.1f} {peak_mib_so_far}"
                print(said.format(**found[-1]), flush=True)
                keep(
                    f"quality_{title}", found, held_out=len(held_out), steps_share=args.steps,
                    calibration_rows=args.rows or len(calibration),
                )  # fmt: skip


def summary(titles: list[str]) -> None:
    """Means over the seeds of kept results, least and most; a row that stands twice counts once."""
    every: dict[tuple[str, float], dict[int, float]] = {}
    for title in titles:
        body = json.loads((RESULTS / f"quality_{title}.json").read_text(encoding="utf-8"))
        for row in body["rows"]:
            every.setdefault((row["method"], row["ratio"]), {})[row["seed"]] = row["kl"]
    for (method, ratio), found in sorted(every.items()):
        kl = found.values()
        print(
            f"{method:26} {ratio:5.1f} KL {mean(kl):.4f} [{min(kl):.4f}, {max(kl):.4f}], "
            f"seeds {sorted(found)}"
        )


def drawn(calibration: torch.Tensor, rows: int | None, seed: int) -> torch.Tensor:
    """So many of the rows (n, 256), as the seed has it; all of them in order where None."""
    if rows is None:
        return calibration
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))
    return calibration[order[:rows]]


def shortened(options: dict[str, Any], share: float) -> dict[str, Any]:
    """The same with a share of the gradient steps."""
    effort = options.get("effort")
    effort = lowrank.EFFORTS[effort] if isinstance(effort, str) else effort
    if effort is None or share == 1.0:
        return options
    recovery = effort if isinstance(effort, Recovery) else effort.recovery
    steps = {key: round(share * getattr(recovery, key)) for key in ("block_steps", "distill_steps")}
    shorter = replace(recovery, **steps)
    same = effort is recovery
    return options | {"effort": shorter if same else replace(effort, recovery=shorter)}


def measured(
    dense: Any, ratio: float, data: list[torch.Tensor], seed: int, options: dict[str, Any],
    held_out: list[torch.Tensor],
) -> dict[str, Any]:  # fmt: skip
    """Compress, and judge on the held-out rows."""
    started = time.perf_counter()
    model, report = lowrank.compress(
        dense, ratio, data=data, align=1, copy=True, progress=False, seed=seed, **options
    )
    seconds = time.perf_counter() - started
    (_, (ppl, away)) = judge([dense, model], held_out)
    return {
        "ratio": ratio, "kept": report.achieved, "kl": away, "perplexity": ppl,
        "params": report.params_after, "bytes": report.bytes_after, "seconds": seconds,
        "peak_mib_so_far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "notes": report.notes,
    }  # fmt: skip


if __name__ == "__main__":
    main()
