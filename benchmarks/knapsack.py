"""The knapsack of the policies beside the two that it replaced, on real curves at equal budgets.

    LOWRANK_ASSETS=… python benchmarks/knapsack.py [--models NAME …] [--repeats 9]

The embedded model (192 calibration rows, seed 0), stories260K (172 rows) and ResNet-20 (1500
images; all convolutions but the first). An eighth of the rows (ResNet: 500 more images) is held out
as efforts do. Budgets in parameters, no rank alignment. Efforts solve `two-sided` with pivoted
storage; convolutions have no pivoted form. Errors are those of the method, or relative to each
site's own energy: lossaware solves both.

The two older solvers are no longer in the library; this file keeps a compact version of each. The
copy of lossaware's is faster than the original, for it knows no curves that share sites. `bisected`
(lossaware's) bisects the price of a unit; `skipping` (spectrum's) passes over hull steps that do
not fit, and fills by error saved instead of error saved per unit. above: error above the Lagrangian
lower bound; differ: sites with another option than `solve` gives, for the older two; ms: medians of
runs taken in turn, of the process's own time.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import keep
from quality import drawn, rows_of

import lowrank
from lowrank.policies import knapsack
from lowrank.types import Allocation, Budget, Curve, Option, Probe

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from compress_resnet_cifar import CALIBRATED, HELD, loaded

METHODS, KEEPS = ("two-sided", "whitened"), (0.8, 0.6, 0.4)
HELD_OUT = 1 / 8
Choice = list[Option]  # one for each curve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':61} above, %: {'':18} differ: ms:")
    names = " ".join(f"{name:>9}" for name in SOLVERS)
    print(
        f"{'model':11} {'method':9} {'storage':7} keep {'errors':8} sites options {'bound':>9} "
        f"{names} bi sk {names}"
    )
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for case, curves, budget in problems(name):
            for errors in ("own", "relative"):
                scaled = curves if errors == "own" else [relative(curve) for curve in curves]
                rows.append({**case, "errors": errors, **compared(scaled, budget, args.repeats)})
                print(line(rows[-1]), flush=True)
    summary(rows)
    keep("knapsack", rows, repeats=args.repeats)


def problems(name: str) -> Iterator[tuple[dict[str, Any], list[Curve], Budget]]:
    """Every method, storage and kept share of a model."""
    model, calibration, exclude = MODELS[name](Path(os.environ["LOWRANK_ASSETS"]))
    calibration = lowrank.with_fisher(model, calibration, progress=False)
    convolutional = name == "resnet20"
    for method in METHODS:
        for storage in ("factors",) if convolutional else ("factors", "pivoted"):
            for share in (*KEEPS, 0.3) if convolutional else KEEPS:
                asked = Asked()
                lowrank.plan(
                    model, share, method=method, storage=storage, policy=asked, data=calibration,
                    align=1, exclude_modules=exclude, progress=False,
                )  # fmt: skip
                case = {"model": name, "method": method, "storage": storage, "keep": share}
                yield case, asked.curves, asked.budget


class Asked:
    """A policy that remembers what it was asked."""

    def __call__(
        self, curves: Sequence[Curve], budget: Budget, probe: Probe | None = None
    ) -> Allocation:
        self.curves, self.budget = list(curves), budget
        return knapsack.solve(curves, budget).choice


def embedded(_assets: Path) -> tuple[Any, lowrank.Calibration, str | None]:
    model, rows, _ = rows_of(argparse.Namespace(model=None))
    return model, calibrated(model, list(drawn(rows, 192, 0).split(16)), HELD_OUT), None


def stories(assets: Path) -> tuple[Any, lowrank.Calibration, str | None]:
    text = assets / "text" / "stories260K_selfgenerated.txt"
    model, rows, _ = rows_of(argparse.Namespace(model=str(assets / "stories260K"), text=str(text)))
    return model, calibrated(model, list(rows.split(16)), HELD_OUT), None


def resnet(assets: Path) -> tuple[Any, lowrank.Calibration, str | None]:
    model, train, _, _ = loaded(assets / "cifar10")
    data, share = list(train[: CALIBRATED + HELD].split(50)), HELD / (CALIBRATED + HELD)
    return model, calibrated(model, data, share), "conv1|linear"


MODELS: dict[str, Callable[[Path], tuple[Any, lowrank.Calibration, str | None]]] = {
    "embedded": embedded, "stories260K": stories, "resnet20": resnet
}  # fmt: skip


def calibrated(model: Any, data: list[torch.Tensor], hold_out: float) -> lowrank.Calibration:
    return lowrank.calibrate(model, data, hold_out=hold_out, progress=False)


def relative(curve: Curve) -> Curve:
    """Errors as shares of the zero matrix's."""
    options = tuple(replace(o, error=o.error / curve.total) for o in curve.options)
    return replace(curve, options=options)


def compared(curves: list[Curve], budget: Budget, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in SOLVERS}
    choices: dict[str, Choice] = {}
    for _ in range(repeats):
        for name, solver in SOLVERS.items():
            started = time.process_time()
            choices[name] = solver(curves, budget)
            seconds[name].append(time.process_time() - started)
    bound, ours = knapsack.solve(curves, budget).bound, choices["solve"]
    assert all(cost(choice, budget) <= budget.limit for choice in choices.values())
    return {
        "sites": len(curves),
        "options": sum(len(curve.options) for curve in curves),
        "bound": bound,
        "error": {name: error(choice) for name, choice in choices.items()},
        "above_bound": {name: error(choice) / bound - 1 for name, choice in choices.items()},
        "differ": {
            name: sum(one != other for one, other in zip(choice, ours, strict=True))
            for name, choice in choices.items()
        },
        "seconds": {name: median(values) for name, values in seconds.items()},
    }


def line(row: dict[str, Any]) -> str:
    above = " ".join(f"{100 * value:9.4f}" for value in row["above_bound"].values())
    differ = " ".join(f"{count:2}" for count in list(row["differ"].values())[1:])
    spent = " ".join(f"{1000 * value:9.1f}" for value in row["seconds"].values())
    case = (
        "{model:11} {method:9} {storage:7} {keep:4} {errors:8} {sites:5} {options:7} {bound:9.3g}"
    )
    return f"{case.format(**row)} {above} {differ} {spent}"


def summary(rows: list[dict[str, Any]]) -> None:
    """What `solve` is against each of the older ones, over all problems."""
    for name in list(SOLVERS)[1:]:
        other = sum(row["differ"][name] > 0 for row in rows)
        ratios = [100 * (row["error"]["solve"] / row["error"][name] - 1) for row in rows]
        lower, higher = [-r for r in ratios if r < -1e-10], [r for r in ratios if r > 1e-10]
        faster = [row["seconds"][name] / row["seconds"]["solve"] for row in rows]
        print(
            f"solve against {name}: another allocation in {other} of {len(rows)} problems; error "
            f"lower in {len(lower)} (at most by {max(lower, default=0):.4f} %), higher in "
            f"{len(higher)} (at most by {max(higher, default=0):.4f} %); {min(faster):.1f} to "
            f"{max(faster):.1f} times as fast, median {median(faster):.1f}"
        )


def solve(curves: list[Curve], budget: Budget) -> Choice:
    choice = knapsack.solve(curves, budget).choice
    return [choice[curve.sites] for curve in curves]


def bisected(curves: list[Curve], budget: Budget) -> Choice:
    """lossaware's older solver: the least price of a unit that fits."""

    def at(price: float) -> Choice:
        return [
            min(curve.options, key=lambda o: o.error + price * o.cost.of(budget.unit))
            for curve in curves
        ]

    low, high = 0.0, 1.0
    while cost(at(high), budget) > budget.limit and high < 1e30:
        low, high = high, 16 * high
    if cost(at(low), budget) <= budget.limit:
        return at(low)
    for _ in range(200):
        middle = math.sqrt(low * high) if low > 0 else high / 1024
        fits = cost(at(middle), budget) <= budget.limit
        low, high = (low, middle) if fits else (middle, high)
        if high - low <= 1e-12 * high or high < 1e-30:
            break
    return filled(curves, at(high), budget, per_unit=True)


def skipping(curves: list[Curve], budget: Budget) -> Choice:
    """spectrum's older solver: hull steps by rate, without those that do not fit."""
    hulls = [hull(curve.options, budget) for curve in curves]
    choice = [corners[0] for corners in hulls]
    left = budget.limit - cost(choice, budget)
    steps = [
        (rate(one, other, budget), index, other)
        for index, corners in enumerate(hulls)
        for one, other in pairwise(corners)
    ]
    stopped: set[int] = set()
    for gain, index, option in sorted(steps, key=lambda step: -step[0]):
        extra = option.cost.of(budget.unit) - choice[index].cost.of(budget.unit)
        if index in stopped or extra > left or gain <= 0:
            stopped.add(index)
            continue
        choice[index] = option
        left -= extra
    return filled(curves, choice, budget, per_unit=False)


def hull(options: Sequence[Option], budget: Budget) -> Choice:
    """Corners of the lower convex hull of cost and error."""
    corners: Choice = []
    for option in options:
        while len(corners) > 1 and rate(corners[-2], option, budget) >= rate(
            corners[-2], corners[-1], budget
        ):
            corners.pop()
        corners.append(option)
    return corners


def filled(curves: list[Curve], choice: Choice, budget: Budget, *, per_unit: bool) -> Choice:
    """The rest of the budget, change by change: the one that saves most, or most per unit."""
    choice = list(choice)
    while True:
        left, best = budget.limit - cost(choice, budget), (0.0, 0, choice[0])
        for index, curve in enumerate(curves):
            now, most = choice[index], choice[index].cost.of(budget.unit) + left
            for option in curve.options:
                if option.error < now.error and option.cost.of(budget.unit) <= most:
                    gain = rate(now, option, budget) if per_unit else now.error - option.error
                    best = best if best[0] >= gain else (gain, index, option)
        if not best[0]:
            return choice
        choice[best[1]] = best[2]


def rate(one: Option, other: Option, budget: Budget) -> float:
    """Error saved per unit."""
    more = other.cost.of(budget.unit) - one.cost.of(budget.unit)
    return (one.error - other.error) / more if more > 0 else math.inf


def cost(choice: Choice, budget: Budget) -> int:
    return sum(option.cost.of(budget.unit) for option in choice)


def error(choice: Choice) -> float:
    return math.fsum(option.error for option in choice)


SOLVERS: dict[str, Callable[[list[Curve], Budget], Choice]] = {
    "solve": solve, "bisected": bisected, "skipping": skipping
}  # fmt: skip

if __name__ == "__main__":
    main()
