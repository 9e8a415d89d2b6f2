"""`sweep`: size against loss at several ratios, from one calibration and decomposition."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration import self_written
from ..calibration.batches import LENGTH, Batch, first_rows, materialise, read_rows, rebatched
from ..calibration.digests import check_place, data_print
from ..calibration.file import load_calibration, save_calibration
from ..calibration.fisher import FISHER, with_fisher
from ..calibration.running import first_tensor
from ..calibration.statistics import SELF, Calibration
from ..errors import LowrankError
from ..measure.eval import KL, Reference
from ..plans.plan import Plan, versions
from ..plans.report import Report
from ..recover.workbench import Workbench
from ..tables import aligned
from ..types import Site
from ..walk.checks import check_model
from ..walk.parts import parts_apart, separate_parts
from ..walk.sites import find_sites
from ..walk.surgery import copied, twin
from .allocating import bench_of, hold_out_of
from .applying import carry_out
from .deciding import Feed, check_alike, statistics_for, targets_among
from .parting import parted
from .planning import make_plan
from .request import Request, Sweeping
from .signatures import flat


@dataclass(frozen=True, eq=False)
class Point:
    """The result at one ratio.

    Attributes:
        ratio: the ratio asked for.
        report: holds the plan, which `lowrank.apply` carries out with the sweep's calibration.
        kl: mean KL(dense ‖ compressed) in nats per position, on held-out rows if there are any;
            None if not judged.
        seconds: time for this ratio alone: plan, factors, recovery and judging.
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
    """The result of `sweep`: one point per ratio, by falling ratio.

    Attributes:
        points: one per ratio.
        calibration: statistics and spectra of all points, None without data. Pass it as `data=` to
            add a ratio without running the model again.
        seconds: time before the first ratio: statistics and gradients.
        judged_rows: number of rows that the KL is measured on; 0 if not judged.
        judged_on_seen: the statistics come from the same rows, on which factors look better than
            they are; pass other rows as `judge=` where that matters.
    """

    points: tuple[Point, ...]
    calibration: Calibration | None
    seconds: float
    judged_rows: int
    judged_on_seen: bool = False

    def front(self) -> tuple[Point, ...]:
        """The Pareto front of size and KL; all points if none was judged."""
        front: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.report.bytes_after, p.kl or 0.0)):
            if point.kl is None or not front or point.kl < (front[-1].kl or 0.0):
                front.append(point)
        return tuple(front)

    def triples(self) -> list[tuple[str, float, float]]:
        """(method, share kept, KL) of each judged point, for `lowrank.plots.pareto`."""
        return [(p.plan.method, p.report.achieved, p.kl) for p in self.points if p.kl is not None]

    def rows(self) -> list[dict[str, str]]:
        """One row per point, as text; * marks the Pareto front."""
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
        """All figures at full precision, and every plan, as JSON."""
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
        head = f"{plan.method}, {plan.settings['policy']}: {self.seconds:.1f} s once for all ratios"
        if self.judged_rows:
            kind = "calibration" if self.judged_on_seen else "held-out"
            head += f"; KL in nats per position on {self.judged_rows} {kind} rows"
        return "\n".join([head, *aligned(self.rows())])


@flat(Sweeping)
@parts_apart
def sweep(model: nn.Module, asked: Sweeping) -> Sweep:
    """Compress copies of the model to several ratios, and return size against loss.

    The model is calibrated and every weight decomposed once for all ratios; each ratio then costs
    factorisation, recovery if an `effort` asks for it, and judging. The result at each ratio is
    that of `compress`.

    Args:
        model: unchanged.
        …

    Raises:
        LowrankError: as `compress`; no ratio, or one twice; the cache is for something else.
    """
    check_model(model)
    requests = [asked.request(ratio) for ratio in _falling(asked.ratios)]
    first = requests[0]
    check_alike(model, first.data, {**first.said(), "ratios": str(asked.ratios)})
    sites = find_sites(model)
    wanted = targets_among(sites, model, first)
    path = None if asked.cache is None else Path(asked.cache)
    if path is not None:
        check_place(path)
    started = time.perf_counter()
    hold_out = hold_out_of(first, wanted)
    stored = _stored(model, path, first, hold_out)
    calibration = stored or statistics_for(
        model, sites, Feed.of(first), needed=first.method is None or bool(first.needs()),
        hold_out=hold_out,
    )  # fmt: skip
    if calibration is not None and first.needs() & FISHER:
        calibration = with_fisher(
            model, calibration, wanted,
            needs=first.needs(), seed=first.seed, progress=first.progress,
        )  # fmt: skip
    judge = _judge(model, calibration, asked)
    bench = bench_of(model, calibration, first)
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
    """What all ratios share."""

    model: nn.Module
    sites: Sequence[Site]
    wanted: Sequence[Site]
    calibration: Calibration | None
    bench: Workbench | None
    judge: Reference | None

    def point(self, request: Request) -> Point:
        with separate_parts(self.model):  # fused layers that this ratio has by parts
            return self._point(request)

    def _point(self, request: Request) -> Point:
        started = time.perf_counter()
        fused = parted(self.model, self.sites, self.wanted, self.calibration, request)
        bench = self.bench
        if fused.sizes:
            bench = bench_of(self.model, fused.calibration, request)
        plan, curves, resolved = make_plan(
            self.model, request, fused.wanted, fused.calibration, bench,
            remember=True, known=fused.curves,
        )  # fmt: skip
        plan = fused.noted(plan)
        # Recovery writes trained norms and biases into the student, so it needs its own copy.
        recovers = request.recovery is not None
        student = copied(self.model) if recovers else twin(self.model)
        student, report = carry_out(
            student, plan, fused.sites, resolved, fused.calibration,
            bench=bench, curves=curves, started=started, progress=request.progress,
        )  # fmt: skip
        kl = None if self.judge is None else self.judge.kl(student)
        return Point(float(request.ratio or 0), report, kl, time.perf_counter() - started)


def _falling(ratios: Any) -> list[float]:
    given = list(ratios) if isinstance(ratios, Sequence) and not isinstance(ratios, str) else []
    if not given or len(set(given)) < len(given):
        raise LowrankError(
            f"ratios must be distinct fractions kept, such as [0.9, 0.8], got {ratios!r}"
        )
    wrong = [r for r in given if not isinstance(r, Real) or isinstance(r, bool)]
    if wrong:
        raise LowrankError(f"ratios must be numbers in (0, 1), got {wrong[0]!r}")
    return sorted(map(float, given), reverse=True)


def _stored(
    model: nn.Module, path: Path | None, request: Request, hold_out: float
) -> Calibration | None:
    """The calibration in the cache; None if there is none yet, or `data` is a Calibration.

    Raises:
        LowrankError: it was made from other data, or with other rows held out.
    """
    data = request.data
    if path is None or not path.exists() or isinstance(data, Calibration):
        return None
    calibration = load_calibration(path, model)
    held = calibration.held_out
    if data is None or (isinstance(data, str) and data in ("default", SELF)):
        same = data is not None and calibration.source == self_written.described(
            model, seed=request.seed, rows=request.rows
        )
    else:
        given = read_rows(data, request.tokenizer, length=LENGTH, rows=request.rows).batches
        if callable(given) or callable(calibration.batches):
            raise LowrankError("a callable cannot be cached: calibrate first")
        if request.rows is not None and not calibration.whole:
            given = first_rows(given, request.rows)
        rows = [*rebatched(calibration.batches, 1), *rebatched(held, 1)]
        same = data_print(rebatched(given, 1)) == data_print(rows)
    if not same:
        raise LowrankError(f"the cache {path} was made from other data: choose another name")
    if bool(held) != (hold_out > 0):
        raise LowrankError(
            f"the cache {path} was made {'with' if held else 'without'} held-out rows, this sweep "
            f"needs {'none' if held else 'some'}: choose another name"
        )
    return calibration


def _judge(model: nn.Module, calibration: Calibration | None, asked: Sweeping) -> Reference | None:
    """The batches to measure the KL on, with the dense model; None if there are none."""
    if asked.judge is not None:
        batches = materialise(asked.judge, asked.tokenizer, length=LENGTH)
        if callable(batches):
            raise LowrankError(
                "judge must be texts or batches to run both models on, not a callable"
            )
        return Reference(model, batches)
    if calibration is None or callable(calibration.batches):
        return None
    if calibration.source and not calibration.held_out:  # further self-written rows
        rows = max(self_written.COUNT // 8, 1)
        written = self_written.written_batches(
            model, rows=rows, seed=asked.seed + 2, progress=asked.progress
        )
        return Reference(model, written)
    judge = Reference(model, calibration.held_out or calibration.batches)
    return judge if not judge.can_judge() or judge.measure == KL else None  # values have no KL


def _judged_rows(judge: Reference | None, calibration: Calibration | None) -> tuple[int, bool]:
    """Number of rows that the KL is measured on, and whether the statistics come from them."""
    rows = 0 if judge is None else sum(map(_rows, judge.batches))
    judged_on_seen = (
        judge is not None and calibration is not None and judge.batches is calibration.batches
    )
    return rows, judged_on_seen


def _rows(batch: Batch) -> int:
    first = first_tensor(batch)
    return 0 if first is None else len(first)
