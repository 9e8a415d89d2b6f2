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

from ..calibration import self_written
from ..calibration.batches import LENGTH, Batch, materialise, rebatched
from ..calibration.digests import check_place, data_print
from ..calibration.file import load_calibration, save_calibration
from ..calibration.fisher import FISHER, with_fisher
from ..calibration.running import first_tensor
from ..calibration.statistics import SELF, Calibration
from ..errors import LowrankError
from ..measure.eval import Reference
from ..plans.plan import Plan, versions
from ..plans.report import Report
from ..recover.chain import Workbench
from ..tables import aligned
from ..types import Site
from ..walk.sites import check_model, find_sites
from ..walk.surgery import twin
from .allocating import workbench
from .applying import carry_out
from .planning import make_plan
from .request import Request, Sweeping
from .verbs import flat, statistics_for, targets_among


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
        judged_on_seen: the statistics come from those rows, on which factors look better than they
            are: hold rows out (`judge=`) where that matters.
    """

    points: tuple[Point, ...]
    calibration: Calibration | None
    seconds: float
    judged_rows: int
    judged_on_seen: bool = False

    def front(self) -> tuple[Point, ...]:
        """The points that no other one beats in both size and KL; all where none was judged."""
        front: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.report.bytes_after, p.kl or 0.0)):
            if point.kl is None or not front or point.kl < (front[-1].kl or 0.0):
                front.append(point)
        return tuple(front)

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
                "judged_on_seen": self.judged_on_seen, "versions": versions()}  # fmt: skip
        return json.dumps(body, indent=1)

    def __str__(self) -> str:
        plan = self.points[0].plan
        head = f"{plan.method}, {plan.settings['policy']}: {self.seconds:.1f} s once, then"
        if self.judged_rows:
            kind = "calibration rows, which the statistics saw" if self.judged_on_seen else ""
            head += f" (KL: nats per position on {self.judged_rows} {kind or 'held-out rows'})"
        return "\n".join([head, *aligned(self.rows())])


@flat(Sweeping)
def sweep(model: nn.Module, asked: Sweeping) -> Sweep:
    """Compress copies of the model to several ratios, and show size against loss.

    The model is run for its statistics once and every weight is decomposed once for all ratios;
    each ratio then costs factors, recovery where an `effort` asks for it, and judging. At each
    ratio the result is that of `compress`.

    Args:
        model: is not changed.
        …

    Raises:
        LowrankError: as `compress`; no ratio, or one twice; a cache of something else.
    """
    check_model(model)
    requests = [asked.request(ratio) for ratio in _falling(asked.ratios)]
    first = requests[0]
    sites = find_sites(model)
    wanted = targets_among(sites, model, first)
    path = None if asked.cache is None else Path(asked.cache)
    if path is not None:
        check_place(path)
    started = time.perf_counter()
    stored = _stored(model, path, first)
    calibration = stored or statistics_for(
        model, sites, first.data, first.tokenizer,
        needed=first.method is None or bool(first.needs()), seed=first.seed,
        hold_out=first.hold_out, progress=first.progress,
    )  # fmt: skip
    if calibration is not None and first.needs() & FISHER:
        calibration = with_fisher(
            model, calibration, wanted, seed=first.seed, progress=first.progress
        )
    judge = _judge(model, calibration, asked)
    bench = workbench(model, calibration, first)
    seconds = time.perf_counter() - started
    known = 0 if calibration is None else len(calibration.spectra)
    swept = _Swept(model, sites, wanted, calibration, bench, judge)
    points = [swept.point(request) for request in requests]
    new = calibration is not None and (
        calibration is not stored or len(calibration.spectra) > known
    )
    if path is not None and calibration is not None and new:
        save_calibration(calibration, path, model)
    return Sweep(tuple(points), calibration, seconds, *_judged_rows(judge, calibration))


@dataclass(frozen=True)
class _Swept:
    """What all ratios have in common."""

    model: nn.Module
    sites: Sequence[Site]
    wanted: Sequence[Site]
    calibration: Calibration | None
    bench: Workbench | None
    judge: Reference | None

    def point(self, request: Request) -> Point:
        started = time.perf_counter()
        plan, curves, resolved = make_plan(
            self.model, request, self.wanted, self.calibration, self.bench, remember=True
        )
        # Recovery that trains hands norms and biases over: to a copy of its own.
        trains = request.recovery is not None
        student = copying.deepcopy(self.model) if trains else twin(self.model)
        student, report = carry_out(
            student, plan, self.sites, resolved, self.calibration,
            bench=self.bench, curves=curves, started=started, progress=request.progress,
        )  # fmt: skip
        away = None if self.judge is None else self.judge.kl(student)
        return Point(float(request.ratio or 0), report, away, time.perf_counter() - started)


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


def _stored(model: nn.Module, path: Path | None, request: Request) -> Calibration | None:
    """What the cache holds; None where there is none yet, or a finished calibration is given.

    Raises:
        LowrankError: it was made from other data than those given, or held other rows out.
    """
    data = request.data
    if path is None or not path.exists() or isinstance(data, Calibration):
        return None
    calibration = load_calibration(path, model)
    held = calibration.held_out
    if data is None or (isinstance(data, str) and data in ("default", SELF)):
        same = data is not None and calibration.source == self_written.described(
            model, seed=request.seed
        )
    else:
        given = materialise(data, request.tokenizer, length=LENGTH)
        if callable(given) or callable(calibration.batches):
            raise LowrankError("a callable cannot be recognised again: calibrate first")
        rows = [*rebatched(calibration.batches, 1), *rebatched(held, 1)]
        same = data_print(rebatched(given, 1)) == data_print(rows)
    if not same:
        raise LowrankError(f"the cache {path} was made from other data: choose another name")
    if bool(held) != (request.hold_out > 0):
        raise LowrankError(
            f"the cache {path} was made with {'' if held else 'no '}rows held out for judging, "
            "which is done where an effort, policy or method judges: choose another name"
        )
    return calibration


def _judge(model: nn.Module, calibration: Calibration | None, asked: Sweeping) -> Reference | None:
    """What the KL is taken on; None where there is nothing."""
    if asked.judge is not None:
        batches = materialise(asked.judge, asked.tokenizer, length=LENGTH)
        if callable(batches):
            raise LowrankError("judge must hold batches that both models can be given")
        return Reference(model, batches)
    if calibration is None or callable(calibration.batches):
        return None
    if calibration.source and not calibration.held_out:  # more of what the model writes
        rows = max(self_written.COUNT // 8, 1)
        written = self_written.written_batches(
            model, rows=rows, seed=asked.seed + 2, progress=asked.progress
        )
        return Reference(model, written)
    return Reference(model, calibration.held_out or calibration.batches)


def _judged_rows(judge: Reference | None, calibration: Calibration | None) -> tuple[int, bool]:
    """How many rows the KL is taken on, and whether the statistics come from them."""
    rows = 0 if judge is None else sum(map(_rows, judge.batches))
    judged_on_seen = (
        judge is not None and calibration is not None and judge.batches is calibration.batches
    )
    return rows, judged_on_seen


def _rows(batch: Batch) -> int:
    first = first_tensor(batch)
    return 0 if first is None else len(first)
