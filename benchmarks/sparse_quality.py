"""Output error and held-out KL of every stored form at equal file bytes, values in 16 bits.

    python benchmarks/sparse_quality.py [--ratios 0.8 0.5 0.3] [--density 0.2 0.3 0.5]
                                        [--models embedded]

The embedded model, and stories260K where LOWRANK_ASSETS is set: all layers but the head to the same
share of their bytes (indices and masks counted), uniformly, no alignment, no recovery but the
refit in closed form of those marked "fast". Statistics are those of the model in fp32, values are
bfloat16, and the judged model computes in fp32 with them. Forms that multiply as dense layers do
stand last, and a form that cannot get so small is left out. The error is
√(Σ E‖Ŵx − Wx‖² / Σ E‖Wx‖²) over the layers. With --density, dense-sparse at each of these.
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
from lowrank.demo import LENGTH, held_out_rows, judge, tiny_lm
from lowrank.methods import DenseSparse

ROWS = 32  # held out
FORMS: dict[str, dict[str, Any]] = {
    "whitened": {"method": "whitened"},
    "pivoted": {"method": "whitened", "storage": "pivoted"},
    "dense-sparse": {"method": "dense-sparse"},
    "lowrank-sparse": {"method": "lowrank-sparse"},
    "blast": {"method": "blast"},
    "auto": {"method": lowrank.METHODS["auto"]()},
    "lowrank-2:4": {"method": "lowrank-2:4"},
    "lowrank-masked": {"method": "lowrank-masked"},
    "pivoted, fast": {"method": "whitened", "storage": "pivoted", "effort": "fast"},
    "lowrank-masked, fast": {"method": "lowrank-masked", "effort": "fast"},
}


def embedded() -> tuple[Any, Tensor, list[Tensor]]:
    """The model, calibration rows (n, LENGTH), and held-out rows of LENGTH + 1."""
    tiny = tiny_lm()
    ids = torch.tensor(tiny.tokenizer(tiny.calibration, verbose=False)["input_ids"])
    count = len(ids) // LENGTH
    return tiny.model, ids[: count * LENGTH].view(count, LENGTH), held_out_rows(tiny)[-ROWS:]


def stories(assets: Path) -> tuple[Any, Tensor, list[Tensor]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (assets / "text" / "stories260K_selfgenerated.txt").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False).input_ids)
    count = len(ids) // (LENGTH + 1)
    rows = ids[: count * (LENGTH + 1)].view(count, LENGTH + 1)
    parted = round(0.6 * count)
    return model, rows[:parted, :-1], list(rows[-ROWS:])


def compared(
    title: str, dense: Any, calibration: Tensor, rows: list[Tensor], args: argparse.Namespace
) -> list[dict[str, Any]]:
    seen = lowrank.calibrate(dense, list(calibration.split(16)), progress=False)
    low, found = copy.deepcopy(dense).bfloat16(), []
    forms = dict(FORMS)
    for density in args.density:
        forms[f"dense-sparse, s / r {density}"] = {"method": DenseSparse(density=density)}
    print(f"\n{title}\n{'form':26} {'ratio':>5} {'bytes':>10} {'kept':>7} {'error':>7} {'KL':>8} s")
    for ratio in args.ratios:
        for name, how in forms.items():
            started = time.perf_counter()
            try:
                model, report = lowrank.compress(
                    low, ratio, unit="bytes", policy="uniform", align=1, data=seen, copy=True,
                    progress=False, **how,
                )  # fmt: skip
            except lowrank.LowrankError as error:
                print(f"{name:26} {ratio:5.1f} {error}")
                continue
            seconds = time.perf_counter() - started
            error = (
                sum(site.measured or 0.0 for site in report.sites)
                / sum(site.total for site in report.sites)
            ) ** 0.5
            away = judge([dense, model.float()], rows)[1][1]
            print(
                f"{name:26} {ratio:5.1f} {report.bytes_after:10,} {report.achieved:7.4f} "
                f"{error:7.4f} {away:8.4f} {seconds:.0f}",
                flush=True,
            )
            found.append(
                {
                    "model": title, "form": name, "ratio": ratio, "bytes": report.bytes_after,
                    "kept": report.achieved, "error": error, "kl": away, "seconds": seconds,
                }
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.5, 0.3])
    parser.add_argument("--density", type=float, nargs="+", default=[])
    parser.add_argument("--models", nargs="+", default=["embedded", "stories260K"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = {"embedded": embedded}
    assets = os.environ.get("LOWRANK_ASSETS")
    if assets:
        models["stories260K"] = lambda: stories(Path(assets))
    else:
        print("LOWRANK_ASSETS is unset: the embedded model alone")
    models = {title: load for title, load in models.items() if title in args.models}
    found = [row for title, load in models.items() for row in compared(title, *load(), args)]
    keep("sparse_quality", found, held_out_rows=ROWS)


if __name__ == "__main__":
    main()
