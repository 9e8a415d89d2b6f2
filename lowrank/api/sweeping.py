"""`sweep`: one calibration and one decomposition, several ratios, a table of size against loss."""

from __future__ import annotations

import copy as copying
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration.batches import LENGTH, Batch, materialise, rebatched
from ..calibration.digests import check_place, data_print
from ..calibration.file import load_calibration, save_calibration
from ..calibration.fisher import FISHER, with_fisher
from ..calibration.running import first_tensor
from ..calibration.self_written import described, writes
from ..calibration.statistics import SELF, Calibration, calibrate
from ..errors import LowrankError
from ..measure.eval import kl
from ..plans.plan import Plan
from ..plans.report import Report
from ..plans.versions import versions
from ..recover.recovery import Recovery
from ..tables import aligned
from ..types import JointMethod, Method, Policy, Storage, Unit
from ..walk.checks import check_model
from ..walk.sites import ALL_LINEAR, Patterns
from ..walk.surgery import twin
from .applying import carry_out
from .efforts import Effort
from .planning import make_plan
from .request import Of, OnMissing, Prefer, Request, targets_of
from .verbs import HOLD_OUT, Source

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True, eq=False)
class Point:
    """One ratio and what came of it.

    Attributes:
        ratio: what was asked for.
        report: with the plan, which `lowrank.apply` carries out on the calibration of the sweep.
        kl: mean KL(dense ‖ compressed) on held-out rows, nats per position; None: not judged.
        seconds: of this ratio alone: plan, factors, recovery and judging.
    """

    ratio: float
    report: Report
    kl: float | None
    seconds: float

    @property
    def plan(self) -> Plan:
        return self.report.plan


@dataclass(frozen=True, eq=False)
class Sweep:
    """Points by falling ratio; the model that was swept is as it was.

    Attributes:
        points: one a ratio.
        calibration: the statistics and spectra that all of them come from, None without data;
            accepted as `data=` everywhere, so that one more ratio costs no new pass.
        seconds: before the first ratio: statistics and gradients.
        judged_rows: rows that the KL was taken on; 0: none.
    """

    points: tuple[Point, ...]
    calibration: Calibration | None
    seconds: float
    judged_rows: int

    def front(self) -> tuple[Point, ...]:
        """The points that no other one beats in both size and KL; all where none was judged."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.report.bytes_after, p.kl or 0.0)):
            if point.kl is None or not found or point.kl < (found[-1].kl or 0.0):
                found.append(point)
        return tuple(found)

    def triples(self) -> list[tuple[str, float, float]]:
        """(method, share kept, KL), as `lowrank.plots.pareto` draws them."""
        return [(p.plan.method, p.report.achieved, p.kl) for p in self.points if p.kl is not None]

    def rows(self) -> list[dict[str, str]]:
        """One row a point, as text; * stands on the front."""
        front = {id(point) for point in self.front()}
        return [
            {
                "ratio": f"{p.ratio:g}",
                "kept": f"{p.report.achieved:.4f}",
                "of model": f"{p.report.achieved_of_model:.4f}",
                "parameters": f"{p.report.params_after:,}",
                "bytes": f"{p.report.bytes_after:,}",
                "KL": "" if p.kl is None else f"{p.kl:.4f}",
                "front": "*" if p.kl is not None and id(p) in front else "",
                "seconds": f"{p.seconds:.1f}",
            }
            for p in self.points
        ]

    def to_json(self) -> str:
        """The table with full numbers, and every plan."""
        points = [
            {
                "ratio": p.ratio, "kept": p.report.achieved, "params": p.report.params_after,
                "bytes": p.report.bytes_after, "kl": p.kl, "seconds": p.seconds,
                "plan": json.loads(p.plan.to_json()),
            }
            for p in self.points
        ]  # fmt: skip
        body = {"points": points, "seconds": self.seconds, "judged_rows": self.judged_rows,
                "versions": versions()}  # fmt: skip
        return json.dumps(body, indent=1)

    def __str__(self) -> str:
        plan = self.points[0].plan
        head = f"{plan.method}, {plan.settings['policy']}: {self.seconds:.1f} s once, then"
        if self.judged_rows:
            head += f" (KL: nats per position on {self.judged_rows} held-out rows)"
        return "\n".join([head, *aligned(self.rows())])


def sweep(
    model: nn.Module,
    ratios: Sequence[float] = RATIOS,
    *,
    method: str | Method | JointMethod | None = None,
    policy: str | Policy | None = None,
    data: Source = "default",
    tokenizer: Any = None,
    judge: Any = None,
    effort: str | Recovery | Effort | None = None,
    of: Of = "targets",
    unit: Unit = "params",
    prefer: Prefer = "size",
    target_modules: Patterns = ALL_LINEAR,
    exclude_modules: Patterns | None = None,
    align: int | None = None,
    storage: Storage | None = None,
    on_missing: OnMissing = "dense",
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sweep:
    """Compress copies of the model to several ratios, and show size against loss.

    The model is run for its statistics once and every weight is decomposed once for all ratios;
    each ratio then costs factors, recovery where an `effort` asks for it, and judging.

    Args:
        ratios: fractions kept, each as for `compress`.
        judge: batches or texts to take the KL on, as for `kl`; None: the calibration rows that no
            statistic saw (an eighth of them); without data nothing is judged.
        cache: a file (safetensors) that the statistics, spectra and rows are written to, and read
            from the next time; one made for another model or other data is refused. The model is
            not run on `data` then.

    The others are those of `compress`.

    Raises:
        LowrankError: as `compress`; no ratio, or one twice; a cache of something else.
    """
    check_model(model)
    requests = [
        Request(
            ratio=ratio, method=method, policy=policy, effort=effort, of=of, unit=unit,
            prefer=prefer, target_modules=target_modules, exclude_modules=exclude_modules,
            align=align, storage=storage, on_missing=on_missing, seed=seed,
        )
        for ratio in _falling(ratios)
    ]  # fmt: skip
    first = requests[0]
    wanted = targets_of(model, first)
    path = None if cache is None else Path(cache)
    if path is not None:
        check_place(path)
    started = time.perf_counter()
    seen = stored = _stored(model, path, data, tokenizer, seed)
    if seen is None:
        seen = _calibrated(model, first, data, tokenizer, progress)
    if seen is not None and first.needs() & FISHER:
        seen = with_fisher(model, seen, wanted, seed=seed, progress=progress)
    held = _held(seen, judge, tokenizer)
    seconds, known = time.perf_counter() - started, 0 if seen is None else len(seen.spectra)
    points = [_point(model, request, wanted, seen, held, progress) for request in requests]
    if path is not None and seen is not None and (seen is not stored or len(seen.spectra) > known):
        save_calibration(seen, path, model)
    return Sweep(tuple(points), seen, seconds, sum(map(_rows, held)))


def _falling(ratios: Any) -> list[float]:
    given = list(ratios) if isinstance(ratios, Sequence) and not isinstance(ratios, str) else []
    if not given or len(set(given)) < len(given):
        raise LowrankError(
            f"ratios must be different shares kept, such as [0.9, 0.8], got {ratios!r}"
        )
    wrong = [r for r in given if not isinstance(r, Real) or isinstance(r, bool)]
    if wrong:
        raise LowrankError(f"ratios must be numbers in (0, 1), got {wrong[0]!r}")
    return sorted(map(float, given), reverse=True)


def _stored(
    model: nn.Module, path: Path | None, data: Source, tokenizer: Any, seed: int
) -> Calibration | None:
    """What the cache holds; None where there is none yet, or a finished calibration is given.

    Raises:
        LowrankError: it was made from other data than those given.
    """
    if path is None or not path.exists() or isinstance(data, Calibration):
        return None
    seen = load_calibration(path, model)
    if data is None or (isinstance(data, str) and data in ("default", SELF)):
        same = data is not None and seen.source == described(model, seed=seed)
    else:
        given, held = materialise(data, tokenizer, length=LENGTH), seen.held_out
        if callable(given) or callable(seen.batches):
            raise LowrankError("a callable cannot be recognised again: calibrate first")
        rows = [*rebatched(seen.batches, 1), *rebatched(held, 1)]
        same = data_print(rebatched(given, 1)) == data_print(rows)
    if not same:
        raise LowrankError(f"the cache {path} was made from other data: choose another name")
    return seen


def _calibrated(
    model: nn.Module, request: Request, data: Source, tokenizer: Any, progress: bool
) -> Calibration | None:
    if isinstance(data, str) and data == "default":
        needed = request.method is None or bool(request.needs())
        data = SELF if needed and writes(model) else None
    if data is None:
        return None
    return calibrate(
        model, data, tokenizer=tokenizer, seed=request.seed, hold_out=HOLD_OUT, progress=progress
    )


def _held(seen: Calibration | None, judge: Any, tokenizer: Any) -> Sequence[Batch]:
    """What the KL is taken on; nothing where there is nothing."""
    if judge is not None:
        found = materialise(judge, tokenizer, length=LENGTH)
        if callable(found):
            raise LowrankError("judge must hold batches that both models can be given")
        return found
    return () if seen is None else seen.held_out


def _point(
    model: nn.Module,
    request: Request,
    wanted: Sequence[Any],
    seen: Calibration | None,
    held: Sequence[Batch],
    progress: bool,
) -> Point:
    started = time.perf_counter()
    decided, curves = make_plan(model, request, wanted, seen, progress=progress)
    # Recovery that trains hands norms and biases over: to a copy of its own.
    trains = request.recovery is not None
    student = copying.deepcopy(model) if trains else twin(model)
    way = None if request.method is None or isinstance(request.method, str) else request.method
    student, report = carry_out(
        student, decided, seen, way=way, curves=curves, started=started, progress=progress
    )
    away = _judged(student, model, held)
    return Point(float(request.ratio or 0), report, away, time.perf_counter() - started)


def _judged(student: nn.Module, model: nn.Module, held: Sequence[Batch]) -> float | None:
    if not held:
        return None
    return kl(student, model, list(held))


def _rows(batch: Batch) -> int:
    first = first_tensor(batch)
    return 0 if first is None else len(first)
