"""What a choice of ranks is worth: policies, ranks by sensitivity, and a random choice.

    python benchmarks/sensitivity.py

The embedded model, whitened SVD, no alignment; statistics from the first part of the calibration
text, sensitivities from the rest of it, KL to the dense model on the first part of the held-out
text. "sensitivity": the share of its parameters that a layer keeps rises with its KL at 0.5, in
proportion (simple) or to the power 1/4 (damped). "random": shares drawn uniformly, then scaled to
the same budget; three seeds. All are policies: any callable of curves and a budget is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from machine import keep

import lowrank
from lowrank.demo import LENGTH, tiny_lm
from lowrank.types import Allocation, Budget, Curve, Option, Probe

RATIOS, SEEDS = (0.8, 0.6), (0, 1, 2)
HELD_OUT, GRAMS = 60_000, 120_000  # characters
SENSED = 12_000


class ByScore:
    """A layer keeps the share scale · score of its parameters, at most dense, at least rank 1."""

    def __init__(self, scores: Mapping[str, float]) -> None:
        self.scores = scores

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        low, high = 0.0, 1.0 / min(self.scores.values())
        for _ in range(60):
            middle = (low + high) / 2
            spent = sum(o.cost.params for o in self._chosen(curves, middle).values())
            low, high = (middle, high) if spent <= budget.limit else (low, middle)
        return self._chosen(curves, low)

    def _chosen(self, curves: Sequence[Curve], scale: float) -> dict[tuple[str, ...], Option]:
        return {c.sites: _largest(c, scale * self.scores[c.sites[0]]) for c in curves}


def _largest(curve: Curve, share: float) -> Option:
    fitting = [o for o in curve.options if o.cost.params <= share * curve.dense.cost.params]
    return fitting[-1] if fitting else curve.options[0]


def random_scores(sites: Sequence[str], seed: int) -> dict[str, float]:
    drawn = torch.rand(len(sites), generator=torch.Generator().manual_seed(seed))
    return dict(zip(sites, (drawn * 0.9 + 0.1).tolist(), strict=True))


def main() -> None:
    torch.set_num_threads(1)
    tiny = tiny_lm()
    seen = lowrank.calibrate(
        tiny.model, tiny.calibration[:GRAMS], tokenizer=tiny.tokenizer, progress=False
    )
    sensed = lowrank.sensitivity(
        tiny.model, tiny.calibration[-SENSED:], ratios=(0.5,), calibration=seen,
        tokenizer=tiny.tokenizer,
    )  # fmt: skip
    away = sensed.at(0.5)
    policies: dict[str, Any] = {name: name for name in ("uniform", "spectrum", "energy", "welore")}
    policies["sensitivity, simple"] = ByScore(away)
    policies["sensitivity, damped"] = ByScore({name: value**0.25 for name, value in away.items()})
    for seed in SEEDS:
        policies[f"random {seed}"] = ByScore(random_scores(sensed.sites, seed))
    rows = [_row(tiny, seen, name, p, ratio) for ratio in RATIOS for name, p in policies.items()]
    for ratio in RATIOS:
        found = [r["kl"] for r in rows if r["policy"].startswith("random") and r["ratio"] == ratio]
        print(f"random at {ratio}: {mean(found):.4f} +- {stdev(found):.4f} over {len(found)} seeds")
    used = {
        "held_out": f"the first {HELD_OUT} of {len(tiny.held_out)} characters",
        "statistics": f"the first {GRAMS} characters of the calibration text",
        "sensitivity": f"its last {SENSED} characters, {sensed.positions} positions, at 0.5",
    }
    keep("sensitivity", rows, texts=used, sensitivity_at_half=away)


def _row(tiny: Any, seen: Any, name: str, policy: Any, ratio: float) -> dict[str, Any]:
    model, report = lowrank.compress(
        tiny.model, ratio, method="whitened", policy=policy, data=seen, align=1, copy=True,
        progress=False,
    )  # fmt: skip
    held_out = tiny.held_out[:HELD_OUT]
    divergence = lowrank.kl(model, tiny.model, held_out, tokenizer=tiny.tokenizer, length=LENGTH)
    print(f"{name:20} {ratio:.1f} kept {report.achieved:.4f} KL {divergence:.4f}", flush=True)
    return {"policy": name, "ratio": ratio, "kept": report.achieved, "kl": divergence}


if __name__ == "__main__":
    main()
