"""Which policy should be the default? Every policy on the embedded model, equal budgets.

    python benchmarks/policies.py

Mean KL to the dense model on the held-out text, fp32, no rank alignment; `kept` is what is really
stored of the targeted weights. benchmarks/real_llama.py prints the same for another real model.
"""

from __future__ import annotations

import torch
from machine import keep

import lowrank
from lowrank.demo import held_out_rows, judge, tiny_lm

RATIOS = (0.8, 0.6, 0.4)


def main() -> None:
    torch.set_num_threads(2)
    tiny = tiny_lm()
    seen = lowrank.calibrate(tiny.model, tiny.calibration, tokenizer=tiny.tokenizer, progress=False)
    runs = [(m, p, r) for m in ("svd", "whitened") for p in lowrank.POLICIES for r in RATIOS]
    models, kept = [tiny.model], []
    for method, policy, ratio in runs:
        model, report = lowrank.compress(
            tiny.model, ratio, method=method, policy=policy, data=seen, align=1, copy=True,
            progress=False,
        )  # fmt: skip
        models.append(model)
        kept.append(report.achieved)
    found = judge(models, held_out_rows(tiny))[1:]
    rows = []
    print(f"{'method':10} {'policy':10} {'keep':>5} {'kept':>7} {'KL':>8}")
    for (method, policy, ratio), share, (_, away) in zip(runs, kept, found, strict=True):
        print(f"{method:10} {policy:10} {ratio:5.1f} {share:7.4f} {away:8.4f}")
        rows.append({"method": method, "policy": policy, "ratio": ratio, "kept": share, "kl": away})
    keep("policies", rows)


if __name__ == "__main__":
    main()
